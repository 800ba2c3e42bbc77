#include <stdint.h>

typedef struct task task;

/* Elements `from`, a multiple of 8, to `to` of t->a clamped between t->low and t->high into t->out, which may be t->a; and
   a bit of each, by the gate t->rule, into t->bits, unless that is NULL. */
void lowrank_clamp_piece(const task *t, int64_t from, int64_t to);
