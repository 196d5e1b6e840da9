// Runs the calls of a request in one session, for Node and browsers alike.
//
// The request has `file`, `adapters` (files by name) and `calls`: each with `feeds`, and with either `adapter`,
// which adapters.mjs chooses, or `raw`, for feeds that go to the runtime itself. With `new`, that many tokens are
// generated greedily, with a cache.

const ARRAYS = { int64: BigInt64Array, float32: Float32Array };

function tensor(ort, { type, dims, data }) {
  return new ort.Tensor(type, ARRAYS[type].from(type === "int64" ? data.map(BigInt) : data), dims);
}

async function generate(ort, model, feeds, adapter, count) {
  const rows = feeds.input_ids.dims[0];
  const tokens = Array.from({ length: rows }, () => []);
  const { data, dims } = feeds.attention_mask;
  let mask = tokens.map((_, row) => Array.from(data.subarray(row * dims[1], (row + 1) * dims[1])));
  const ids = (values) => new ort.Tensor("int64", BigInt64Array.from(values.flat()), [rows, values[0].length]);
  for (let step = 0; step < count; step++) {
    const { logits, ...cache } = await model.run(feeds, adapter);
    const [, length, size] = logits.dims;
    const next = tokens.map((_, row) => {
      const end = (row + 1) * length * size;
      const last = logits.data.subarray(end - size, end);
      return last.indexOf(last.reduce((a, b) => Math.max(a, b)));
    });
    next.forEach((token, row) => tokens[row].push(token));
    mask = mask.map((row) => [...row, 1n]);
    feeds = { input_ids: ids(next.map((token) => [BigInt(token)])), attention_mask: ids(mask) };
    for (const [name, value] of Object.entries(cache)) feeds[name.replace("present", "past_key_values")] = value;
  }
  return { tokens };
}

export async function answers(ort, { AdapterModel }, request, read, options) {
  const model = await AdapterModel.open(ort, await read(request.file), options);
  for (const [name, file] of Object.entries(request.adapters)) model.load(name, await read(file));
  const found = [];
  for (const { feeds, adapter, raw, new: count } of request.calls) {
    try {
      const tensors = Object.fromEntries(Object.entries(feeds).map(([name, value]) => [name, tensor(ort, value)]));
      if (count) {
        found.push(await generate(ort, model, tensors, adapter, count));
        continue;
      }
      const outputs = raw ? await model.session.run(tensors) : await model.run(tensors, adapter);
      // JSON has no NaN.
      const listed = ({ data }) => Array.from(data, (value) => (Number.isFinite(value) ? value : "nan"));
      found.push(Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, listed(value)])));
    } catch (error) {
      found.push({ error: String(error) });
    }
  }
  return { names: model.names, results: found };
}
