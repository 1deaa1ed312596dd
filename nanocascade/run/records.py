"""A rollout as a line of rollouts.jsonl: its texts, its verdict, its per-token values."""

from nanocascade.data.episode import Rollout

LOGGED_TOKENS = 1024  # tokens of a response whose values are written; its text is complete


def rollout_record(x: Rollout, step: int, group: int, tokenizer) -> dict:
    """group: index of the prompt among the logged prompts of its domain in this step."""
    record = {
        "step": step,
        "domain": x.domain,
        "group": group,
        "prompt": tokenizer.decode(x.tokens[: x.prompt_length]),
        "response": tokenizer.decode(x.tokens[x.prompt_length :]),
        "reward": x.reward,
        "reason": x.reason,
        "advantage": x.advantage,
        "stop_reason": x.stop_reason,
    }
    if x.token_values is not None:
        record["tokens"] = token_record(x, tokenizer)
    return record


def token_record(x: Rollout, tokenizer) -> dict:
    """{"text": [...], "loss": "110...", name: [...]}: an entry for each token of the response."""
    length = len(x.tokens) - x.prompt_length
    mask = x.mask[x.prompt_length :][:LOGGED_TOKENS]
    record = {
        "text": token_texts(x.tokens[x.prompt_length :][:LOGGED_TOKENS], tokenizer),
        "loss": "".join("1" if trained and x.loss else "0" for trained in mask),
    }
    for name, values in x.token_values.items():
        shown = values[len(values) - length :][:LOGGED_TOKENS]
        record[name] = [float(f"{y:.4g}") for y in shown]
    return record


def token_texts(ids: list[int], tokenizer) -> list[str]:
    """The text that each token adds, "" if it only begins a character. They join to the whole text.

    A token is decoded after its predecessors, since some decoders drop a leading space.
    """
    texts, begin, done = [], 0, 0  # ids[begin:done] have been shown
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[begin:done]), tokenizer.decode(ids[begin:end])
        complete = not now.endswith("\ufffd") or end == len(ids)
        texts.append(now[len(before) :] if complete else "")
        if complete:
            begin, done = done, end
    return texts
