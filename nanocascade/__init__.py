"""nanocascade: the post-training recipe of Nemotron-Cascade 2 (arXiv 2603.19220), to be read.

Reading order: stages.py (the cascade as data); train_rl.py with grpo.py, train_mopd.py with mopd.py
and importance.py, train_sft.py with sft.py; rollouts/; then sampler.py and model/.

Axes, the same letters in every shape comment of the package:
    b  sequences (rows of a batch)        t  positions          v  vocabulary
    d  model width                        n  tokens, flattened (b*t)
    h  heads (attention or Mamba)         k  key/value heads    c  channels per head
    s  SSM state size                     g  Mamba groups       q  chunk length
    z  chunks                             l  blocks of a kind   m  conv channels (x, B, C together)
    e  experts                            a  active experts     u  1 or 2: up, and gate
    f  hidden width of an MLP             p  prompts            r  rollouts per prompt (report: G)
    w  taps of the convolution            o  documents of a packed batch (responses, in a loss)
    j  chunks of a level (scan.py)
A primed letter, as z', counts some of the same things; the line where it stands says which. Losses
are written for (b, t). A Batch has one row of t inputs and n predictions: they get (1, n).

Paper symbol -> name in the code:
    pi_theta, pi_train    train_logprobs     log-probs of the trained model, with gradient
    pi_inf                sampler_logprobs   log-probs the sampler returned with the tokens
    pi_i (domain i)       teacher_logprobs   log-probs of the domain's teacher
    A_i                   advantages         rewards, standardised within a group
    r_t (Eq. 3)           ratio              pi_train / pi_inf
    a_t (Eq. 2)           teacher_advantage  log pi_i - log pi_train
    |V(y)|                num_tokens         valid response tokens of one response
"""

__version__ = "0.2.0"
