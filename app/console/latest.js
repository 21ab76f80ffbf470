// Asking again and again while something is moved: soon, and only the last answer counts.

const SOON = 60; // milliseconds of rest before the question is asked

export class Latest {
  #timer = 0;
  #asked = null;

  /** Ask (signal) => promise in a moment; whatever was asked before is dropped. */
  soon(ask, wait = SOON) {
    this.stop();
    this.#timer = setTimeout(() => {
      this.#asked = new AbortController();
      ask(this.#asked.signal);
    }, wait);
  }

  stop() {
    clearTimeout(this.#timer);
    this.#asked?.abort();
  }
}
