// Runs a folder with transformers.js: TASK FOLDER DTYPE INPUT(JSON). Prints JSON.
import { AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, Tensor, env } from "@huggingface/transformers";
import path from "node:path";

const [task, folder, dtype, input] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
const name = path.basename(folder);
const given = JSON.parse(input);

function ids(rows) {
  return new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
}

const classes = { generate: AutoModelForCausalLM, features: AutoModel, classify: AutoModelForSequenceClassification };
const model = await classes[task].from_pretrained(name, { dtype, device: "cpu" });
const inputs = { input_ids: ids(given.ids), attention_mask: ids(given.mask) };
if (task === "generate") {
  const out = await model.generate({ ...inputs, max_new_tokens: given.new, do_sample: false });
  console.log(JSON.stringify(out.tolist().map((row) => row.map(Number))));
} else {
  const out = await model(inputs);
  const tensor = out.logits ?? out.last_hidden_state;
  console.log(JSON.stringify({ type: tensor.type, dims: tensor.dims, data: Array.from(tensor.data) }));
}
