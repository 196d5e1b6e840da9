"""A sentence classifier, trained in a plain loop. The saved folder names the task and the base model."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from lora_fx.peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

torch.manual_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
base = BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))
base.save_pretrained("bert")
ids, labels = torch.randint(100, (16, 12)), torch.randint(2, (16,))

peft_config = LoraConfig(
    task_type=TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1
)
model = get_peft_model(BertForSequenceClassification.from_pretrained("bert"), peft_config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-2)
model.train()
losses = []
for _ in range(10):
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("the loss falls:", losses[-1] < losses[0])

model.eval()
model.save_pretrained("classifier")
config = PeftConfig.from_pretrained("classifier")
print(config.peft_type, config.task_type, config.base_model_name_or_path)
inference = BertForSequenceClassification.from_pretrained(config.base_model_name_or_path)
inference = PeftModel.from_pretrained(inference, "classifier")
inference.eval()
print("loaded:", torch.allclose(inference(ids).logits, model(ids).logits, atol=1e-5))
