"""A worker whose queue is a stream: ``queue.backend = "jetstream"``.

| module | what it is for |
|---|---|
| ``queue`` | wires these and a connection together; in the place of ``fastdist.worker.queue`` |
| ``outgoing`` | publishes what emitters bring, and has them answered |
| ``claims`` | claims messages, and tells the stream when their packets are settled |
| ``dead_letters`` | puts dead letters into their stream |
| ``waits`` | tells an emitter that waits at another worker, or replica, what became of its packet |

Both ways lead through a ring in memory. Emitters' packets are in one until the stream has acknowledged them, as with
durability ``fsync`` until they are synced; packets that were claimed are in another, from which the dispatcher takes
them as from any.
"""
