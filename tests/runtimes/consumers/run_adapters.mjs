// Runs calls with adapters.mjs in Node: MODULE CALLS REQUEST, run_calls.mjs and a JSON file; prints what each call gives, or its error.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import * as packaged from "onnxruntime-node";

const ort = packaged.default ?? packaged;
const [module, calls, file] = process.argv.slice(2);
const { answers } = await import(pathToFileURL(calls));
const request = JSON.parse(readFileSync(file, "utf8"));
const read = async (path) => new Uint8Array(readFileSync(path));
const adapters = await import(pathToFileURL(module));
console.log(JSON.stringify(await answers(ort, adapters, request, read, { logSeverityLevel: 4 })));
