// The child's side of spa.engines.worker in JavaScript:  node serve.mjs ADAPTER.mjs NODE_MODULES [ARGUMENT …]
//
// An adapter exports version(modules, ...arguments) and load(modules, path, threads, options, ...arguments), which gives
// {meta, run(feeds) -> outputs, bind(feeds) -> call}; all may be async. Feeds and outputs are {name: {dtype, shape, data}}, data a Buffer
// (numpy's names of types). Whatever it logs goes to stderr: stdout belongs to the answers. It ends when stdin does.

import fs, { writeSync } from "node:fs";
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

// WebAssembly of emscripten's writes with fs.writeSync, which is replaced here; the imported name stays what it was.
fs.writeSync = (to, ...what) => writeSync(to === 1 ? 2 : to, ...what);
for (const name of ["log", "info", "debug", "warn"]) console[name] = console.error;

const [file, modules, ...rest] = process.argv.slice(2);
let opened = null;
let call = null;

function read(tensors) {
  return Object.fromEntries(Object.entries(tensors).map(([n, t]) => [n, { dtype: t.dtype, shape: t.shape, data: fs.readFileSync(t.file) }]));
}

function write(outputs, folder) {
  return Object.fromEntries(
    Object.entries(outputs).map(([name, tensor], i) => {
      const target = path.join(folder, `output${i}.bin`);
      fs.writeFileSync(target, tensor.data);
      return [name, { dtype: tensor.dtype, shape: tensor.shape, file: target }];
    }),
  );
}

async function answer(adapter, asked) {
  switch (asked.do) {
    case "version":
      return { version: await adapter.version(modules, ...rest) };
    case "load":
      opened = await adapter.load(modules, asked.model, asked.threads, asked.options, ...rest);
      return opened.meta;
    case "run":
      return { outputs: write(await opened.run(read(asked.feeds)), asked.folder) };
    case "bind":
      call = await opened.bind(read(asked.feeds));
      return {};
    case "call": {
      const cpu = process.cpuUsage();
      const start = process.hrtime.bigint();
      const seconds = await call(); // an adapter that measures where the model runs says so
      const wall = Number(process.hrtime.bigint() - start) / 1e9;
      const { user, system } = process.cpuUsage(cpu);
      return { seconds: seconds ?? wall, thread_seconds: (user + system) / 1e6 };
    }
    case "close":
      await opened.close();
      return {};
    default:
      throw new Error(`there is no ${asked.do}`);
  }
}

let adapter = null;
for await (const line of readline.createInterface({ input: process.stdin })) {
  let said;
  try {
    adapter ??= await import(pathToFileURL(file).href);
    said = await answer(adapter, JSON.parse(line));
  } catch (error) {
    console.error(error);
    said = { error: String(error?.message ?? error) };
  }
  writeSync(1, JSON.stringify(said) + "\n");
}
await opened?.close?.();
process.exit(0); // threads of a runtime would keep it alive
