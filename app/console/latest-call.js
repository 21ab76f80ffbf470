// Runs one call at a time while inputs change, and always the newest one in the end.

const DELAY = 60; // milliseconds before a call, since more changes may follow
const PATIENCE = 1000; // milliseconds before a newer call aborts the running one

export class LatestCall {
  #next = null;
  #startAt = 0;
  #timer = 0;
  #running = null;
  #startedAt = 0;

  /** Run `call(signal)` after `wait` ms, or after the running call. `rest`: only if nothing newer follows in that time. */
  schedule(call, { wait = DELAY, rest = false } = {}) {
    const startAt = performance.now() + wait;
    this.#startAt = this.#next && !rest ? Math.min(this.#startAt, startAt) : startAt;
    this.#next = call;
    this.#setTimer();
  }

  /** Run `call` at once, and abort the running call. */
  runNow(call) {
    this.cancel();
    this.schedule(call, { wait: 0 });
  }

  /** Abort the running call, and drop the scheduled one. */
  cancel() {
    clearTimeout(this.#timer);
    this.#next = null;
    this.#running?.abort();
    this.#running = null;
  }

  #setTimer() {
    clearTimeout(this.#timer);
    const at = this.#running ? Math.max(this.#startAt, this.#startedAt + PATIENCE) : this.#startAt;
    this.#timer = setTimeout(() => this.#run(), at - performance.now());
  }

  async #run() {
    const call = this.#next;
    this.cancel();
    const running = new AbortController();
    this.#running = running;
    this.#startedAt = performance.now();
    try {
      await call(running.signal);
    } finally {
      if (this.#running === running) {
        this.#running = null;
        if (this.#next) this.#setTimer();
      }
    }
  }
}
