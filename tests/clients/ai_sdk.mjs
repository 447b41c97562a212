// Reads a chat with the AI SDK's own transport, and prints what it made of it as one line of JSON.
// What to do comes as JSON: {api, headers?, body?, stop?: {url, after}, resume?: url}. With `resume`
// the running turn's stream is read, else `body` is sent; `stop` ends the turn once so much was said.
import { DefaultChatTransport, readUIMessageStream } from "ai";

const task = JSON.parse(process.argv[2]);
const headers = task.headers ?? {};
const transport = new DefaultChatTransport({
  api: task.api,
  headers,
  prepareSendMessagesRequest: () => ({ body: task.body }),
  prepareReconnectToStreamRequest: () => ({ api: task.resume }),
});
const stream = task.resume
  ? await transport.reconnectToStream({ chatId: "chat" })
  : await transport.sendMessages({
      trigger: "submit-message",
      chatId: "chat",
      messageId: undefined,
      messages: [],
      abortSignal: undefined,
    });

const types = [];
const errors = [];
let message = null;
let stopped = false;
const noted = stream?.pipeThrough(
  new TransformStream({
    transform(chunk, controller) {
      types.push(chunk.type);
      controller.enqueue(chunk);
    },
  }),
);
if (noted) {
  const onError = (error) => errors.push(error.message);
  for await (const state of readUIMessageStream({ stream: noted, onError })) {
    message = structuredClone(state);
    const text = message.parts.map((part) => part.text ?? "").join("");
    if (task.stop && !stopped && text.length >= task.stop.after) {
      stopped = true;
      await fetch(task.stop.url.replace("TURN", message.metadata.turn_id), {
        method: "POST",
        headers,
      });
    }
  }
}
const text = message?.parts.map((part) => part.text ?? "").join("");
console.log(JSON.stringify({ streamed: stream !== null, types, errors, message, text }));
