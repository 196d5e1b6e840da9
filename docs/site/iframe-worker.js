// A search for pages that are opened as files, where browsers refuse to start a Worker.
//
// The theme asks for `IFrameWorker` if a page has one: something with the methods of a Worker, whose code
// runs in a frame. The frame is a document of its own, so that the code finds `postMessage`, `importScripts`
// and its own script element there.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inner = this.frame.contentWindow;
    const load = (source) =>
      new Promise((resolve, reject) => {
        const script = inner.document.createElement("script");
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${source} cannot be loaded`));
        script.src = source;
        inner.document.body.append(script);
      });
    inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    inner.importScripts = async (...sources) => {
      for (const source of sources) await load(source);
    };
    this.ready = load(url);
  }

  postMessage(data) {
    const message = new MessageEvent("message", { data: structuredClone(data) });
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(message));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = window.IFrameWorker = FrameWorker;
