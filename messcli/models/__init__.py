"""What runs a model, and how a window of requests is answered and billed.

backend        the protocol, and the table of backends
transformers, vllm, openai, ray   the backends
prompts        a request as a model's tokens
priced, processes   bills of models that no counter of this process sees
live           a zoo's models, their meter and a metric as one source of outcomes
"""
