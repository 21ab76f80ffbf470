// Asking again and again while something is moved: one question at a time, and the newest is always asked.

const SOON = 60; // milliseconds before a question is asked: more may come
const PATIENCE = 1000; // milliseconds that an answer is waited for when there is a newer question

export class Latest {
  #next = null;
  #from = 0; // when to ask it
  #timer = 0;
  #asked = null;
  #began = 0;

  /** Ask (signal) => promise in a moment, or after the answer that is waited for. `rest`: once nothing newer has come. */
  soon(ask, { wait = SOON, rest = false } = {}) {
    const from = performance.now() + wait;
    this.#from = this.#next && !rest ? Math.min(this.#from, from) : from;
    this.#next = ask;
    this.#schedule();
  }

  /** Ask it at once; what was asked before is dropped. */
  now(ask) {
    this.stop();
    this.soon(ask, { wait: 0 });
  }

  /** Drop what was asked and what would be. */
  stop() {
    clearTimeout(this.#timer);
    this.#next = null;
    this.#asked?.abort();
    this.#asked = null;
  }

  #schedule() {
    clearTimeout(this.#timer);
    const at = this.#asked ? Math.max(this.#from, this.#began + PATIENCE) : this.#from;
    this.#timer = setTimeout(() => this.#ask(), at - performance.now());
  }

  async #ask() {
    const ask = this.#next;
    this.stop();
    const asked = new AbortController();
    this.#asked = asked;
    this.#began = performance.now();
    try {
      await ask(asked.signal);
    } finally {
      if (this.#asked === asked) {
        this.#asked = null;
        if (this.#next) this.#schedule();
      }
    }
  }
}
