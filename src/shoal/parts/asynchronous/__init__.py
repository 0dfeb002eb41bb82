"""Learning without rounds: a server that never waits, clients that come and go as they like.

A client *pulls* a model, makes local steps, and *pushes* what came of them; the server turns what
was pushed into the next *version* of the model. `Learning` is the peer program of both: it takes

- a `rule.Rule`: what the server does with the vectors (`step`), and a `rule.Course` for when, and
  with which weights; `buffered.Buffered` is the usual one;
- a `local.Work`: what a client computes between pull and push, `local.Displacement` as a rule;
- a `participation.Habits`: when a client takes part, and how many steps it makes.

What holds for every rule, on every engine, under loss, crashes and restarts of anybody:

- Each work has a name (origin of the server's store, client, number) and is settled once: taken, or
  dropped for a reason that is counted. A push that is sent again is recognised and answered.
- The server commits its books, the works that it has taken and not yet used, and the new model in
  one go before it answers. A client commits its work before it pushes it.
- The staleness of a work is how many versions were made since its model was pulled.
"""
