/* The library as one translation unit, so that every kernel can be inlined into its caller.
 *
 * setup.py compiles this file once for each instruction set; library.py loads the best that the
 * processor has.
 */
#define _GNU_SOURCE /* the pool names cores */

#include "pool.c"

#include "pack.c"

#include "linear.c"

#include "linear_quantized.c"

#include "linear_dot.c"

#include "quantize.c"

#include "norm.c"

#include "activation.c"

#include "greedy.c"

#include "screen_pack.c"

#include "screen.c"

#include "candidates.c"

#include "rotary.c"

#include "attention_pairs.c"

#include "attention_split.c"

#include "attention.c"

#include "decoder.c"

#include "probe.c"

/* The bytes of each shared structure: the loader compares them with those of abi.py. */
EXPORT void headrace_abi_sizes(int64_t sizes[8])
{
    const int64_t own[8] = {sizeof(Linear),    sizeof(LayerCache), sizeof(Cache), sizeof(Batch),
                            sizeof(Attention), sizeof(Rope),       sizeof(Layer), sizeof(Decoder)};
    memcpy(sizes, own, sizeof own);
}
