"""QLoRA: a base in four bits, by bitsandbytes."""

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_fx.peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

torch.manual_seed(0)
sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("llama-64")

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = LlamaForCausalLM.from_pretrained(
    "llama-64", quantization_config=quantization, device_map={"": "cpu"}
)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

ids = torch.randint(3, 60, (4, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
losses = []
for _ in range(6):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("the loss falls:", losses[-1] < losses[0])
model.save_pretrained("qlora")
