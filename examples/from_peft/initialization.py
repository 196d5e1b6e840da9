"""Other initializations of the factors, DoRA, and separate ranks for some layers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fx.peft import (
    EvaConfig,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained("llama")
ids = torch.randint(3, 60, (4, 8))

ways = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 32}},
}
for name, options in ways.items():
    base = LlamaForCausalLM.from_pretrained("llama")
    before = base(ids).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    same = torch.allclose(model(ids).logits, before, atol=1e-4)
    print(name, model.get_nb_trainable_parameters()[0], "the outputs stay:", same)

config = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
)
model = get_peft_model(LlamaForCausalLM.from_pretrained("llama"), config)
batches = [{"input_ids": row[None]} for row in ids]
initialize_lora_eva_weights(model, batches, show_progress_bar=False)
factors = [value for key, value in get_peft_model_state_dict(model).items() if "lora_A" in key]
print("eva:", all(value.abs().sum() > 0 for value in factors))
