"""The toy: generated tasks, their tokenizer and a model of a million parameters, a judge."""
