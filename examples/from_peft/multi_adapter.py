"""Several adapters in one model: activate some, combine them, or use one for each row of a batch."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_fx.peft import LoraConfig, PeftModel, get_peft_model

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
base.save_pretrained("llama")
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
for name in ("summarize", "translate"):
    get_peft_model(LlamaForCausalLM.from_pretrained("llama"), config, name).save_pretrained(
        "adapters"
    )

model = PeftModel.from_pretrained(base, "adapters/summarize", adapter_name="summarize")
model.load_adapter("adapters/translate", adapter_name="translate")
print(sorted(model.peft_config), model.active_adapter)
ids = torch.randint(3, 60, (3, 6))
model.eval()


def logits(name):
    model.set_adapter(name)
    return model(ids).logits


first, second = logits("summarize"), logits("translate")
print("they differ:", not torch.allclose(first, second))
with model.disable_adapter():
    plain = model(ids).logits

mixed = model(ids, adapter_names=["translate", "__base__", "summarize"]).logits
expected = torch.stack([second[0], plain[1], first[2]])
print("each row its own:", torch.allclose(mixed, expected, atol=1e-5))

weights = {"adapters": ["summarize", "translate"], "weights": [0.7, 0.3]}
model.add_weighted_adapter(**weights, adapter_name="both", combination_type="cat")
print("combined:", not torch.allclose(logits("both"), first))
model.set_adapter("summarize")
model.delete_adapter("translate")
print(sorted(model.peft_config), torch.allclose(model(ids).logits, first, atol=1e-5))
print("without:", torch.allclose(model.unload()(ids).logits, plain, atol=1e-5))
