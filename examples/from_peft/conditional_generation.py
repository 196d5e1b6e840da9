"""Adapters in T5, an encoder-decoder: train in a plain loop, and generate."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from lora_fx.peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict

torch.manual_seed(0)
sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
model = get_peft_model(
    model,
    LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, lora_alpha=32, target_modules=["q", "v"]),
)
model.print_trainable_parameters()

ids, labels = torch.randint(3, 60, (8, 10)), torch.randint(3, 60, (8, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("the loss falls:", losses[-1] < losses[0])
print("generated:", model.eval().generate(input_ids=ids, max_new_tokens=3).shape[0])
names = get_peft_model_state_dict(model)
print(len(names), min(names))
