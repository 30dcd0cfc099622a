// What the adapters in JavaScript share: between numpy's types and onnxruntime's, and what its log says. Also served to the page in the browser.

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};

// A tensor of `ort` from raw bytes (an ArrayBuffer or a view of one).
export function tensor(ort, dtype, shape, bytes) {
  const Kind = ARRAYS[dtype];
  if (!Kind) throw new Error(`its JavaScript has no type ${dtype}`);
  const whole = bytes instanceof ArrayBuffer ? bytes : bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  return new ort.Tensor(dtype, new Kind(whole), shape);
}

// The bytes of a tensor that lies in main memory.
export function bytes(value) {
  if (value.type === "string") throw new Error("an output holds text, which cannot leave its process");
  return new Uint8Array(value.data.buffer, value.data.byteOffset, value.data.byteLength);
}

// Feeds of a session from {name: {dtype, shape, data}}.
export function feeds(ort, given) {
  return Object.fromEntries(Object.entries(given).map(([n, t]) => [n, tensor(ort, t.dtype, t.shape, t.data)]));
}

// {name: {dtype, shape, data}} in the order of the session's outputs.
export function outputs(session, found) {
  return Object.fromEntries(session.outputNames.map((n) => [n, { dtype: found[n].type, shape: [...found[n].dims], data: bytes(found[n]) }]));
}

// What ran where, from the runtime's own log: "Node(s) placed on [X]. Number of nodes: 3", then a line "  Conv (name)" for each of them.
// Gives {nodes: {X: 3}, elsewhere: {name: operator}}, the latter of what went to WebAssembly's own kernels.
export function placed(lines) {
  const nodes = {};
  const elsewhere = {};
  let provider = null;
  for (const line of lines.flatMap((text) => text.split("\n"))) {
    const all = line.match(/(?:All nodes|Node\(s\)) placed on \[(\w+)\]\. Number of nodes: (\d+)/);
    const one = line.match(/\]\s{2,}(\w+) \((.*)\)\s*$/);
    if (all) {
      provider = all[1];
      nodes[provider] = (nodes[provider] ?? 0) + Number(all[2]);
    } else if (one && provider === "CPUExecutionProvider") elsewhere[one[2] || one[1]] = one[1];
  }
  return { nodes, elsewhere };
}
