"""How does one stream of work go over several devices, its results in the order of the work?

A thread for each device takes the next item whenever its device can have one, so that a short clip
never waits for a long one elsewhere. One thread for all devices would: past 32 programs on their
way to a GPU, the next call waits for it, and a streamed text encoder waits for every layer.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
WorkerT = TypeVar("WorkerT")

RESULTS_A_WORKER = 32  # that wait for those before them: latents of 1280x704x121 are 21 MB each


def spread(
    run: Callable[[WorkerT, Iterator[ItemT]], Iterator[ResultT]],
    workers: Sequence[WorkerT],
    items: Iterable[ItemT],
) -> Generator[ResultT, None, None]:
    """Yields the result of each item, in order; what fails does so in its turn.

    What ``items`` or ``run`` raises, a keyboard interrupt too, comes after the results of the items
    before. Nothing more is begun then, nor after the caller has closed this generator, as it must
    if it stops early; what is under way ends first.

    Args:
        run: called for each worker in a thread of its own. Yields a result for each item that it
            takes, in order; it may take one more before it yields that of the one before.
        workers: what each call of ``run`` gets first: the copies of a model.
        items: made when they are taken, by one thread at a time.
    """
    turns = _Turns(items, most=RESULTS_A_WORKER * len(workers))
    threads = [
        threading.Thread(target=turns.serve, args=(run, worker), name=f"{number}", daemon=True)
        for number, worker in enumerate(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        while (turn := turns.wait_for_first()) is not None:
            result = turn.result()
            turns.drop_first()
            yield result
    finally:
        turns.end()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()


class _Turns(Generic[ItemT, ResultT]):
    """The items that were taken and whose results were not yielded yet, in order."""

    def __init__(self, items: Iterable[ItemT], *, most: int):
        self._items = iter(items)
        self._most = most
        self._taking = threading.Lock()
        self._changed = threading.Condition()
        self._turns: deque[Future[ResultT]] = deque()
        self._ended = False

    def serve(
        self,
        run: Callable[[WorkerT, Iterator[ItemT]], Iterator[ResultT]],
        worker: WorkerT,
    ) -> None:
        """Runs one worker until there is nothing to take."""
        own: deque[Future[ResultT]] = deque()
        try:
            for result in run(worker, self._take(own)):
                own.popleft().set_result(result)
        except BaseException as error:
            for turn in own:
                turn.set_exception(error)
            self.end(error)

    def wait_for_first(self) -> Future[ResultT] | None:
        """Returns the turn whose result is due; None when there is none and will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._ended)
            return self._turns[0] if self._turns else None

    def drop_first(self) -> None:
        """Makes room for one more."""
        with self._changed:
            self._turns.popleft()
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Lets nobody take any more; the error, if any, is what comes last."""
        with self._changed:
            if error is not None:
                self._turns.append(Future())
                self._turns[-1].set_exception(error)
            self._ended = True
            self._changed.notify_all()

    def _take(self, own: deque[Future[ResultT]]) -> Iterator[ItemT]:
        while True:
            with self._changed:
                # Whoever has the first turn may take: it may yield that result only afterwards.
                self._changed.wait_for(
                    lambda: self._ended or len(self._turns) < self._most or self._turns[0] in own
                )
            with self._taking:
                if self._ended:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    self.end()
                    return
                except BaseException as error:
                    self.end(error)
                    return
                own.append(Future())
                with self._changed:
                    self._turns.append(own[-1])
                    self._changed.notify_all()
            yield item
