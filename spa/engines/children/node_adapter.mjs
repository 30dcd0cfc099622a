// onnxruntime-node, and onnxruntime-web's WebAssembly, in Node.  Arguments of serve.mjs: NODE_MODULES, the package.

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

import { feeds, outputs, placed } from "./tensors.mjs";

function required(modules, name) {
  return createRequire(path.join(modules, "none.js"))(name);
}

export function version(modules, name) {
  required(modules, name);
  return `${name} ${JSON.parse(fs.readFileSync(path.join(modules, name, "package.json"), "utf8")).version}, Node ${process.versions.node}`;
}

export async function load(modules, file, threads, options, name) {
  const ort = required(modules, name);
  const settings = { graphOptimizationLevel: "all" };
  let nodes = {};
  let session;
  if (name === "onnxruntime-node") {
    if (threads) Object.assign(settings, { intraOpNumThreads: threads, interOpNumThreads: 1 });
    session = await ort.InferenceSession.create(file, { ...settings, executionProviders: ["cpu"] });
  } else {
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "verbose"; // tells where each node was placed
    const lines = [];
    const write = fs.writeSync; // what emscripten says its words with
    fs.writeSync = (to, text, ...rest) => (to <= 2 ? void lines.push(String(text)) : write(to, text, ...rest));
    const outside = `${file}.data`;
    if (fs.existsSync(outside)) settings.externalData = [{ path: path.basename(outside), data: new Uint8Array(fs.readFileSync(outside)) }];
    Object.assign(settings, { executionProviders: ["wasm"], logSeverityLevel: 0, logVerbosityLevel: 0 });
    try {
      session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), settings);
    } finally {
      fs.writeSync = write;
      ort.env.logLevel = "error";
    }
    ({ nodes } = placed(lines));
  }
  return {
    meta: { nodes, proven: Object.keys(nodes).length > 0 }, // onnxruntime-node does not say
    run: async (given) => outputs(session, await session.run(feeds(ort, given))),
    bind: (given) => {
      const fed = feeds(ort, given);
      return async () => {
        await session.run(fed);
      };
    },
    close: () => session.release(),
  };
}
