// How tokens fall into windows and chunks. Everything else derives its index arithmetic from this struct.
#pragma once

#include <cstdint>

namespace eva_attn {

// Half-open box of grid positions.
struct Box {
    int64_t y0, y1, x0, x1;

    constexpr int64_t height() const { return y1 - y0; }
    constexpr int64_t width() const { return x1 - x0; }
    constexpr bool empty() const { return y0 >= y1 || x0 >= x1; }
    constexpr bool contains(const Box& other) const {
        return y0 <= other.y0 && other.y1 <= y1 && x0 <= other.x0 && other.x1 <= x1;
    }
    constexpr bool contains(int64_t y, int64_t x) const { return y0 <= y && y < y1 && x0 <= x && x < x1; }
};

// A sequence of n tokens is a grid of height 1. `Int` is int64_t, or torch's symbolic integer where
// shapes are only propagated.
template <class Int>
struct BasicGeometry {
    Int grid_height, grid_width;
    Int window_height, window_width;
    Int chunk_height, chunk_width;
    Int overlap_y, overlap_x;
    Int chunk_overlap_y, chunk_overlap_x;
    Int num_prefix_tokens;
    bool is_causal;

    Int num_tokens() const { return num_prefix_tokens + grid_height * grid_width; }
    Int chunk_rows() const { return (grid_height + chunk_height - 1) / chunk_height; }
    Int chunk_columns() const { return (grid_width + chunk_width - 1) / chunk_width; }
    Int num_chunks() const { return chunk_rows() * chunk_columns(); }
    // relative_bias has one entry per offset key - query: [bias_height, bias_width].
    Int bias_height() const { return 2 * (window_height + overlap_y) - 1; }
    Int bias_width() const { return 2 * (window_width + overlap_x) - 1; }
};

namespace detail {
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
} // namespace detail

// What kernels see. Windows, chunks and overlaps are cut to the grid: more than that changes nothing but
// the size of the bias table, which is therefore kept as it was given.
struct Geometry {
    int64_t grid_height, grid_width;
    int64_t window_height, window_width;
    int64_t chunk_height, chunk_width;
    int64_t overlap_y, overlap_x;
    int64_t chunk_overlap_y, chunk_overlap_x;
    int64_t num_prefix_tokens;
    int64_t bias_height, bias_width;
    bool is_causal;

    static Geometry from(const BasicGeometry<int64_t>& g) {
        using detail::max;
        using detail::min;
        return Geometry{
            .grid_height = g.grid_height,
            .grid_width = g.grid_width,
            .window_height = min(g.window_height, max(g.grid_height, 1)),
            .window_width = min(g.window_width, max(g.grid_width, 1)),
            .chunk_height = min(g.chunk_height, max(g.grid_height, 1)),
            .chunk_width = min(g.chunk_width, max(g.grid_width, 1)),
            .overlap_y = min(g.overlap_y, g.grid_height),
            .overlap_x = min(g.overlap_x, g.grid_width),
            .chunk_overlap_y = min(g.chunk_overlap_y, g.grid_height),
            .chunk_overlap_x = min(g.chunk_overlap_x, g.grid_width),
            .num_prefix_tokens = g.num_prefix_tokens,
            .bias_height = g.bias_height(),
            .bias_width = g.bias_width(),
            .is_causal = g.is_causal,
        };
    }

    constexpr int64_t num_tokens() const { return num_prefix_tokens + grid_height * grid_width; }
    constexpr int64_t token(int64_t y, int64_t x) const { return num_prefix_tokens + y * grid_width + x; }

    constexpr int64_t window_rows() const { return detail::ceil_div(grid_height, window_height); }
    constexpr int64_t window_columns() const { return detail::ceil_div(grid_width, window_width); }
    constexpr int64_t num_windows() const { return window_rows() * window_columns(); }
    constexpr int64_t chunk_rows() const { return detail::ceil_div(grid_height, chunk_height); }
    constexpr int64_t chunk_columns() const { return detail::ceil_div(grid_width, chunk_width); }
    constexpr int64_t num_chunks() const { return chunk_rows() * chunk_columns(); }
    constexpr bool windows_overlap() const { return overlap_y > 0 || overlap_x > 0; }

    // Queries of a window.
    constexpr Box window_box(int64_t window) const {
        return cell(window / window_columns(), window % window_columns(), window_height, window_width, 0, 0,
                    0);
    }
    // Keys of a window: `overlap` further on every side, of a causal window to the left only.
    constexpr Box key_box(int64_t window) const {
        return cell(window / window_columns(), window % window_columns(), window_height, window_width,
                    overlap_y, overlap_x, is_causal ? 0 : overlap_x);
    }
    // Members of a chunk.
    constexpr Box chunk_box(int64_t chunk) const {
        return cell(chunk / chunk_columns(), chunk % chunk_columns(), chunk_height, chunk_width,
                    chunk_overlap_y, chunk_overlap_x, chunk_overlap_x);
    }
    // Windows whose keys may include a token of `window`, as a box of window rows and columns.
    constexpr Box windows_seeing(int64_t window) const {
        const Box own = window_box(window);
        return Box{
            detail::max(detail::floor_div(own.y0 - overlap_y, window_height), 0),
            detail::min(detail::floor_div(own.y1 + overlap_y - 1, window_height) + 1, window_rows()),
            detail::max(detail::floor_div(own.x0 - (is_causal ? 0 : overlap_x), window_width), 0),
            detail::min(detail::floor_div(own.x1 + overlap_x - 1, window_width) + 1, window_columns()),
        };
    }
    // Chunks that the grid position (y, x) is a member of, as a box of chunk rows and columns.
    constexpr Box chunks_of(int64_t y, int64_t x) const {
        return Box{
            detail::max(detail::floor_div(y - chunk_overlap_y, chunk_height), 0),
            detail::min((y + chunk_overlap_y) / chunk_height + 1, chunk_rows()),
            detail::max(detail::floor_div(x - chunk_overlap_x, chunk_width), 0),
            detail::min((x + chunk_overlap_x) / chunk_width + 1, chunk_columns()),
        };
    }

  private:
    constexpr Box cell(int64_t row, int64_t column, int64_t height, int64_t width, int64_t reach_y,
                       int64_t reach_left, int64_t reach_right) const {
        return Box{
            detail::max(row * height - reach_y, 0),
            detail::min((row + 1) * height + reach_y, grid_height),
            detail::max(column * width - reach_left, 0),
            detail::min((column + 1) * width + reach_right, grid_width),
        };
    }
};

} // namespace eva_attn
