// Switches adapters of an ONNX file that lora-fx exported, in a browser or in Node.
//
// The file is one of
//   export_onnx(model, "model.onnx", inputs, adapters="bank")                           another adapter for each row
//   export_onnx(model, "model.onnx", inputs, adapters="inputs", required_inputs=True)   one adapter for each run
//
//   import * as ort from "onnxruntime-web";                                             // or onnxruntime-node
//   const model = await AdapterModel.open(ort, bytes, { executionProviders: ["wasm"] });
//   model.load("maths", adapterBytes);                                                  // of save_onnx_adapter
//   const outputs = await model.run({ input_ids, attention_mask }, "maths");            // null: the base model

const IDS = "adapter_ids";
const MANIFEST = "lora_fx.adapters";
const SUFFIXES = { A: "lora_A.weight", B: "lora_B.weight", bias: "lora_B.bias", gain: "lora_gain" };
const TOKENS = ["lora_tokens.indices", "lora_tokens.weight"];
const ARRAYS = { float32: Float32Array, float64: Float64Array, float16: Uint16Array, int64: BigInt64Array };
const ONE_IN_HALF = 0x3c00;

/** A model whose adapters are chosen for each run. */
export class AdapterModel {
  /**
   * Load a file.
   *
   * @param ort The module onnxruntime-web or onnxruntime-node.
   * @param bytes The .onnx file, a Uint8Array.
   * @param options Options of InferenceSession.create: executionProviders, externalData and others.
   */
  static async open(ort, bytes, options = {}) {
    const text = readMetadata(bytes)[MANIFEST];
    if (text === undefined) {
      throw new Error("the file takes no adapters: export it with adapters='bank', or 'inputs' and required_inputs=True");
    }
    const session = await ort.InferenceSession.create(bytes, options);
    return new AdapterModel(ort, session, JSON.parse(text));
  }

  constructor(ort, session, manifest) {
    this.ort = ort;
    this.session = session;
    this.bank = manifest.bank ?? null;
    this.inputs = this.bank ? new Map() : inputsOf(manifest);
    // A runtime does not feed inputs that have a default, and a tool may have made constants of them.
    const wanted = this.bank ? [IDS] : [...this.inputs.keys()];
    const lost = wanted.filter((name) => !session.inputNames.includes(name));
    if (lost.length > 0) {
      throw new Error(
        `${lost.length} inputs for adapters cannot be fed (${lost[0]}), so that each run would be that of the base ` +
          "model: export the model again with required_inputs=True",
      );
    }
    this.loaded = new Map((this.bank?.adapters ?? []).map((name, number) => [name, number]));
    this.neutral = {};
    // Heads and other parameters that each adapter has its own values of: the base's are in no file of required inputs.
    this.own = [...this.inputs].filter(([, entry]) => entry.role === "parameter").map(([name]) => name);
    for (const [name, entry] of this.inputs) {
      if (entry.role === "parameter") continue;
      const data = new ARRAYS[entry.dtype](entry.least.reduce((a, b) => a * b, 1));
      if (entry.role === "gain") data.fill(entry.dtype === "float16" ? ONE_IN_HALF : 1);
      if (entry.role === "tokens") data.fill(-1n);
      this.neutral[name] = new ort.Tensor(entry.dtype, data, entry.least);
    }
  }

  /** Names of the adapters. */
  get names() {
    return [...this.loaded.keys()];
  }

  /** False if each adapter has its own head: the file then holds none for the base model. */
  get hasBase() {
    return this.own.length === 0;
  }

  /** Load an adapter from the bytes of an .onnx_adapter file. One of the same name is replaced. */
  load(name, bytes) {
    if (this.bank) throw new Error("the adapters of a bank are in its file: export it again with the new one");
    const values = {};
    for (const [key, { dtype, dims, data }] of readAdapter(bytes)) {
      const entry = this.inputs.get(key);
      const fits =
        entry && dims.length === entry.shape.length && dims.every((size, axis) => (entry.shape[axis] ?? size) === size);
      if (!fits) throw new Error(`adapter ${name}: the file takes no ${key} of shape [${dims}]`);
      if (dtype !== entry.dtype) throw new Error(`adapter ${name}: ${key} is ${dtype}, the file takes ${entry.dtype}`);
      if (dtype.startsWith("float") && dtype !== "float16" && !data.every(Number.isFinite)) {
        throw new Error(`adapter ${name}: ${key} has values that are not finite`);
      }
      values[key] = new this.ort.Tensor(dtype, data, dims);
    }
    for (const key of this.own) {
      if (!(key in values)) throw new Error(`adapter ${name}: it lacks its own ${key}, which the file takes`);
    }
    for (const [key, entry] of this.inputs) {
      // Only both factors of a site, of one rank, are an adapter.
      const other = entry.role === "A" ? entry.other : null;
      if (other && key in values !== other in values) throw new Error(`adapter ${name}: it lacks a factor next to ${key}`);
      if (other && key in values) {
        const [a, b] = [key, other].map((one) => rankOf(this.inputs.get(one), values[one].dims));
        if (a !== b) throw new Error(`adapter ${name}: ${key} has rank ${a}, and ${other} has rank ${b}`);
      }
    }
    this.loaded.set(name, { ...this.neutral, ...values });
  }

  /** Remove an adapter. */
  unload(name) {
    if (this.bank) throw new Error("the adapters of a bank are in its file");
    this.#find(name);
    this.loaded.delete(name);
  }

  /**
   * Run once.
   *
   * @param feeds Tensors by name, without those of adapters.
   * @param adapter A name, or null for the base model. For a bank also an array with one for each row.
   */
  async run(feeds, adapter = null) {
    if (!this.bank) {
      if (Array.isArray(adapter)) throw new Error("the file runs one adapter for the whole batch: export a bank");
      if (adapter === null && !this.hasBase) {
        throw new Error(`the file has no base: each adapter has its own ${this.own[0]}`);
      }
      return this.session.run({ ...feeds, ...(adapter === null ? this.neutral : this.#find(adapter)) });
    }
    const rows = Array.isArray(adapter) ? adapter : [adapter];
    const ids = rows.map((name) => (name === null ? -1 : this.#find(name)));
    if (Array.isArray(adapter)) {
      const batch = Object.values(feeds).find((tensor) => tensor.dims.length > 0)?.dims[0];
      if (batch !== rows.length) throw new Error(`${rows.length} adapters for ${batch} rows: give one for each row`);
    }
    const numbers = new this.ort.Tensor("int64", BigInt64Array.from(ids.map(BigInt)), [ids.length]);
    return this.session.run({ ...feeds, [IDS]: numbers });
  }

  #find(name) {
    const found = this.loaded.get(name);
    if (found === undefined) throw new Error(`there is no adapter ${name}: there are ${this.names.join(", ") || "none"}`);
    return found;
  }
}

/** The inputs of a file by name: dtype, shape (null for the rank) and the shape of the least rank. */
function inputsOf(manifest) {
  const inputs = new Map();
  for (const site of manifest.sites) {
    const groups = site.groups ?? 1;
    const named = (role) => (site.name ? `${site.name}.${SUFFIXES[role]}` : SUFFIXES[role]);
    const add = (role, shape, multiple = 1) => {
      const half = site.dtype === "float16" || site.dtype === "bfloat16";
      const dtype = half && role === "gain" ? "float32" : site.dtype;
      if (!(dtype in ARRAYS)) throw new Error(`${site.name}: JavaScript has no arrays of ${dtype}`);
      const least = shape.map((size) => size ?? groups / multiple);
      inputs.set(named(role), { role, dtype, shape, least, multiple, other: named("B") });
    };
    add("A", site.a);
    add("B", site.b, groups);
    if (site.bias) add("bias", [site.out_features]);
    if (site.gain) add("gain", [site.out_features]);
  }
  for (const { name, dtype, shape } of manifest.parameters ?? []) {
    if (!(dtype in ARRAYS)) throw new Error(`${name}: JavaScript has no arrays of ${dtype}`);
    inputs.set(name, { role: "parameter", dtype, shape });
  }
  for (const { name, dtype, shape } of manifest.tokens ?? []) {
    const [tokens, rows] = TOKENS.map((end) => (name ? `${name}.${end}` : end));
    const length = shape.slice(0, 1);
    inputs.set(tokens, { role: "tokens", dtype: "int64", shape: length, least: length });
    inputs.set(rows, { role: "rows", dtype, shape, least: shape });
  }
  return inputs;
}

function rankOf(entry, dims) {
  return dims[entry.shape.indexOf(null)] * entry.multiple;
}

/** The metadata of an ONNX file: entries 14 of its outermost message. The graph is passed over. */
export function readMetadata(bytes) {
  const metadata = {};
  for (const [field, part] of fields(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(fields(part));
    metadata[decode(entry[1] ?? [])] = decode(entry[2] ?? []);
  }
  return metadata;
}

/** The fields of a message of protobuf that have a length, with their bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error("the file is damaged or no ONNX file");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = varint();
      if (at + size > bytes.length) throw new Error("the file is truncated");
      yield [Math.floor(key / 8), bytes.subarray(at, at + size)];
      at += size;
    } else throw new Error("the file is damaged or no ONNX file");
  }
}

const decode = (bytes) => new TextDecoder().decode(Uint8Array.from(bytes));
const DTYPES = { 1: "float32", 7: "int64", 10: "float16", 11: "float64" };

/** The values of an .onnx_adapter file, a flatbuffer of ONNX Runtime: names with dtype, dims and data. */
export function readAdapter(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8 || decode(bytes.subarray(4, 8)) !== "TORT") throw new Error("it is no .onnx_adapter file");
  const follow = (at) => at + view.getUint32(at, true);
  // The position of a field of a table, or 0 for one that is left out.
  const field = (table, index) => {
    const layout = table - view.getInt32(table, true);
    const slot = 4 + 2 * index;
    const offset = slot < view.getUint16(layout, true) ? view.getUint16(layout + slot, true) : 0;
    return offset && table + offset;
  };
  const vector = (at) => {
    if (!at) return [0, 0];
    const start = follow(at);
    return [start + 4, view.getUint32(start, true)];
  };
  const values = new Map();
  const [first, count] = vector(field(follow(0), 3));
  for (let index = 0; index < count; index++) {
    const parameter = follow(first + 4 * index);
    const [text, letters] = vector(field(parameter, 0));
    const name = decode(bytes.subarray(text, text + letters));
    const [axes, rank] = vector(field(parameter, 1));
    const dims = Array.from({ length: rank }, (_, axis) => Number(view.getBigInt64(axes + 8 * axis, true)));
    const kind = field(parameter, 2);
    const dtype = DTYPES[kind ? view.getInt32(kind, true) : 0];
    if (dtype === undefined) throw new Error(`${name}: JavaScript has no arrays of its dtype`);
    const [raw, size] = vector(field(parameter, 3));
    const copy = bytes.slice(raw, raw + size); // aligned, and independent of the file
    const data = new ARRAYS[dtype](copy.buffer);
    if (data.length !== dims.reduce((a, b) => a * b, 1)) throw new Error(`${name}: the file is truncated`);
    values.set(name, { dtype, dims, data });
  }
  return values;
}
