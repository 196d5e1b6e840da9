"""A language model, trained by the Trainer, resumed from a checkpoint, and loaded in one call."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lora_fx.peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("llama")
rows = torch.randint(3, 60, (16, 8))
data = [{"input_ids": row, "labels": row} for row in rows]

peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=32, bias="none")
model = get_peft_model(LlamaForCausalLM.from_pretrained("llama"), peft_config)
model.print_trainable_parameters()
model.config.use_cache = False

arguments = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "report_to": [],
}
arguments |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
trainer = Trainer(model=model, args=TrainingArguments("run", **arguments), train_dataset=data)
trainer.train()
trainer.train(resume_from_checkpoint="run/checkpoint-2")
print("steps:", trainer.state.global_step)

model.save_pretrained("adapter")
loaded = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
model.eval()
print("loaded:", torch.allclose(loaded(rows).logits, model(rows).logits, atol=1e-5))
tokens = {"input_ids": rows[:2], "attention_mask": torch.ones_like(rows[:2]), "max_new_tokens": 4}
print("generated:", tuple(loaded.generate(**tokens, do_sample=False, pad_token_id=0).shape))
