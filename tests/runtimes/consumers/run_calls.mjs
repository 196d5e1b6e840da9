// Runs the calls of a request in one session, for Node and browsers alike.
//
// The request has `file`, `adapters` (files by name) and `calls`: each with `feeds`, and with either `adapter`,
// which adapters.mjs chooses, or `raw`, for feeds that go to the runtime itself.

const ARRAYS = { int64: BigInt64Array, float32: Float32Array };

function tensor(ort, { type, dims, data }) {
  return new ort.Tensor(type, ARRAYS[type].from(type === "int64" ? data.map(BigInt) : data), dims);
}

export async function answers(ort, { AdapterModel }, request, read, options) {
  const model = await AdapterModel.open(ort, await read(request.file), options);
  for (const [name, file] of Object.entries(request.adapters)) model.load(name, await read(file));
  const found = [];
  for (const { feeds, adapter, raw } of request.calls) {
    try {
      const tensors = Object.fromEntries(Object.entries(feeds).map(([name, value]) => [name, tensor(ort, value)]));
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
