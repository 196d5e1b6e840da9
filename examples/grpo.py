"""Learning from a reward: GRPO in a plain loop, with the model that was rewritten as the free reference.

Groups of answers are sampled for each prompt, and answers above the mean of their group get more likely. With
TRL installed, its GRPOTrainer does it (``--loop`` for the plain loop). As it stands the model is tiny and
untrained, and the reward counts even tokens. With a real one, its tokenizer beside it::

    python examples/grpo.py --model FOLDER
"""
