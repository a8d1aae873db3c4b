/* How a weight [out, in] lies in memory: in panels of PANEL outputs, ready for the tile kernel.
 *
 *   [out / PANEL][in / group][PANEL][group]       group: neighbours in depth that lie side by side
 *
 * The kernel reads that strictly forward whatever the number of rows. A group is one element, or
 * the two that one lane of the dot instruction takes. Outputs are padded with zeros to whole
 * panels, the depth to whole groups. Only this file and pack.c know it; Python asks
 * headrace_panel_width() and headrace_depth_group().
 */
#ifndef HEADRACE_PACK_H
#define HEADRACE_PACK_H

#include <stddef.h>

#include "headrace.h"
#include "vec.h"

INLINE int64_t depth_group(enum dtype type) { return HAS_BFLOAT_DOT && type == BFLOAT16 ? 2 : 1; }

INLINE int64_t num_panels(int64_t out_size) { return (out_size + PANEL - 1) / PANEL; }

/* Steps of the tile kernel over the whole depth. */
INLINE int64_t depth_steps(int64_t in_size, enum dtype type)
{
    return (in_size + depth_group(type) - 1) / depth_group(type);
}

/* Elements of one panel, padding included. */
INLINE size_t panel_elements(int64_t in_size, enum dtype type)
{
    return (size_t)depth_steps(in_size, type) * depth_group(type) * PANEL;
}

/* Elements that the packed form of a weight [out, in] takes. */
static size_t packed_elements(int64_t out_size, int64_t in_size, enum dtype type);

/* out [in_size] = one row of a packed weight, widened. */
static void packed_row(const Linear *weight, int64_t row, float *out);

#endif
