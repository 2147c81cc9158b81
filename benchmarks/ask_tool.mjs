// What node-llama-cpp says of an exported model: see ask_tool.py, which asks the others.
//     node ask_tool.mjs PACKAGES MODEL QUESTION.json ANSWER.json

import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [packages, modelPath, question, answer] = process.argv.slice(2);
const entry = createRequire(`${packages}/node_modules/`).resolve("node-llama-cpp");
const {getLlama, LlamaCompletion} = await import(pathToFileURL(entry));
const {passage, prompt, context, n_new: maxTokens} = JSON.parse(readFileSync(question, "utf8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const sequence = (await model.createContext({contextSize: context})).getSequence();
const ids = [...model.tokenize(passage)];
const completion = new LlamaCompletion({contextSequence: sequence});
const added = await completion.generateCompletion(prompt, {temperature: 0, maxTokens});
const {version} = JSON.parse(readFileSync(`${packages}/node_modules/node-llama-cpp/package.json`));
writeFileSync(answer, JSON.stringify({ids, greedy: prompt + added, version}));
process.exit(0);
