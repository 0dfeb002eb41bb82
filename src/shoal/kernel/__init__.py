"""The kernel: all that a peer program may touch, and the bookkeeping that every engine shares.

peer.py     what a program sees (`Peer`, `Program`, `Store`, `Envelope`)
waits.py    what a task can wait for; every wait is a token that resolves at most once
tasks.py    structured tasks, cancellation, the ready queue
mailbox.py  matching of messages to waits
datagrams.py  packets to endpoints: sockets that a crash closes
runtime.py  one peer: tasks, mailbox, handlers, requests; implements `Peer` over a `Host`
host.py     what an engine must offer to a runtime

An engine supplies time, transport, compute and durable commits through `Host`; everything else is
this package, so that an engine cannot differ in what a program observes.
"""
