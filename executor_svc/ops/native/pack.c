/* Brings weights into the layout of pack.h, and single rows of them back. */
#include "pack.h"

#include "quantized.h"

/* Where element k of row `row` of a panel is. */
INLINE size_t place_in_panel(int64_t row, int64_t k, const int64_t group)
{
    return (size_t)(k / group * PANEL + row) * group + k % group;
}

static size_t packed_elements(int64_t out_size, int64_t in_size, enum dtype type)
{
    return num_panels(out_size) * panel_elements(in_size, type);
}

static void packed_row(const Linear *weight, int64_t row, float *out)
{
    enum dtype type = weight->dtype;
    if (is_quantized(type)) {
        quantized_row(weight, row, out);
        return;
    }
    size_t panel = row / PANEL * panel_elements(weight->in_size, type);
    int64_t group = depth_group(type);
    for (int64_t k = 0; k < weight->in_size; k++)
        out[k] = widen_one(weight->panels, panel + place_in_panel(row % PANEL, k, group), type);
}

/* One panel: `rows` rows of `size`-byte elements become columns. In square blocks, so that both
 * sides stay in L1. */
INLINE void pack_panel(const char *from, int64_t rows, int64_t in_size, const size_t size,
                       const int64_t group, char *to)
{
    for (int64_t begin = 0; begin < in_size; begin += PANEL) {
        int64_t end = in_size - begin < PANEL ? in_size : begin + PANEL;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t k = begin; k < end; k++)
                memcpy(to + place_in_panel(row, k, group) * size, from + (row * in_size + k) * size,
                       size);
    }
}

/* Bring a dense weight [out_size, in_size] of any alignment into its packed form; `packed` is
 * zeroed memory of headrace_packed_elements() elements. */
EXPORT void headrace_pack_weight(const void *weight, int64_t out_size, int64_t in_size,
                                 int64_t dtype, void *packed)
{
    size_t size = dtype_size(dtype);
    for (int64_t row = 0; row < out_size; row += PANEL) {
        int64_t rows = out_size - row < PANEL ? out_size - row : PANEL;
        const char *from = (const char *)weight + row * in_size * size;
        char *to = (char *)packed + row / PANEL * panel_elements(in_size, dtype) * size;
        if (dtype == FLOAT32)
            pack_panel(from, rows, in_size, sizeof(float), 1, to);
        else if (depth_group(dtype) == 1)
            pack_panel(from, rows, in_size, sizeof(uint16_t), 1, to);
        else
            pack_panel(from, rows, in_size, sizeof(uint16_t), 2, to);
    }
}

EXPORT int64_t headrace_packed_elements(int64_t out_size, int64_t in_size, int64_t dtype)
{
    return packed_elements(out_size, in_size, dtype);
}

/* Outputs that lie side by side: a bias is padded to a multiple of it. */
EXPORT int64_t headrace_panel_width(void) { return PANEL; }

EXPORT int64_t headrace_depth_group(int64_t dtype) { return depth_group(dtype); }
