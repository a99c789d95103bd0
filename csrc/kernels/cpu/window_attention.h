// Joint attention over [landmarks | prefix keys | window keys], forward and backward. Included once per
// instruction set, behind chunk_summary.h.
//
// Columns of the score tile: landmarks, then prefix keys ("global" columns, the same for every window of a
// head), then the keys of one window. A tile of queries starts from `init` (biases, -inf where hidden from
// all), to which the matrix product adds scale * q.k; columns behind the last one are -inf, so that their
// weights are 0. What is hidden from some queries only, as it lies ahead of them, is seen to row by row.

constexpr int64_t kTileElements = 16384; // of the score tile: 64 KB of floats, a fraction of L2
constexpr int64_t kCausalTileRows = 32;  // fewer see less of what is hidden from the first of them
constexpr int64_t kPrefixBlock = 256;    // keys that prefix queries take at a time
constexpr int64_t kVectorsPerRow = 64;   // of a product, for each row that is fetched beside it
constexpr int64_t kCachedBytes =
    64 << 10; // of a head's queries: L2 then holds two heads of forward's tensors

// A list of tokens with their places in the bias table.
struct TokenList {
    int32_t* token;
    int32_t* place; // y * bias_width + x, ascending
    int32_t* run;   // how many tokens from this one on lie in places side by side
    int64_t size = 0;

    void find_runs() {
        for (int64_t j = size - 1; j >= 0; --j)
            run[j] = j + 1 < size && place[j + 1] == place[j] + 1 ? run[j + 1] + 1 : 1;
    }
    // Calls body(j, place of token j, length) for each run among the first `count`.
    template <class Body>
    void for_runs(int64_t count, Body body) const {
        for (int64_t j = 0; j < count; j += run[j]) body(j, place[j], detail::min(run[j], count - j));
    }
    // Calls body(j, place of token j) for the first `count`; where places lie side by side, in a way that
    // compilers make vectors of.
    template <class Body>
    void for_places(int64_t count, Body body) const {
        const int64_t first = size > 0 ? place[0] : 0;
        if (size > 0 && place[size - 1] - first == size - 1) {
            for (int64_t j = 0; j < count; ++j) body(j, first + j);
        } else {
            for (int64_t j = 0; j < count; ++j) body(j, place[j]);
        }
    }
};

// Is the weight of (query, entry) kept?
struct Keep {
    uint64_t seed, threshold;
    uint32_t query, bh;
    uint32_t block = 0xffffffffu;
    PhiloxWords words{};
    bool operator()(uint32_t entry) {
        if (entry / 4 != block) {
            block = entry / 4;
            words = philox4x32_10(seed, block, query, bh, 0);
        }
        return words.word[entry % 4] >= threshold;
    }
};

// Queries of one (batch, head), and the rows and columns that they are multiplied with.
template <class S, class T>
class AttentionTile {
  protected:
    AttentionTile(const AttentionParams& params, bool backward)
        : p(params), g(params.shape.geometry), head_dim(params.shape.head_dim),
          ld(scratch_row(params.shape.head_dim)), tokens(g.num_tokens()), backward(backward) {}

    void take_queries(Arena& arena, int64_t rows, int64_t columns) {
        kept = arena.take<T>(p.dropout.threshold ? columns : 0);
        query = arena.take<T>(rows * ld);
        grad_out = arena.take<T>(backward ? rows * ld : 0);
        lse = arena.take<T>(rows);
        delta = arena.take<T>(rows);
        block = arena.take<T>(kWidth<T> * ld);
    }

    void start_head(int64_t bh) {
        current_bh = bh;
        batch = bh / p.shape.heads;
        head = bh % p.shape.heads;
    }

    bool is_padded(int64_t token) const { return is_padding(p.key_padding_mask, batch, tokens, token); }

    // `count` rows, token(j) of the tensor for j = 0, 1, ..., zeros for a negative token.
    template <class Token>
    void copy_rows(const Rows& rows, int64_t count, Token token, T* out) {
        for (int64_t j = 0; j < count; ++j) {
            const int64_t t = token(j);
            if (t < 0)
                zero(out + j * ld, ld);
            else
                load_row<S, T>(rows, batch, head, t, head_dim, out + j * ld);
        }
    }
    // row(j, room for one) for j = 0, 1, ... as columns from `column` on, with zeros behind up to a whole
    // vector.
    template <class Row>
    void transpose_rows(int64_t column, int64_t count, Row row, T* out, int64_t ld_out) {
        const int64_t end = whole_vectors<T>(column + count) - column;
        for (int64_t j = 0; j < end; j += kWidth<T>) {
            const T* from[kWidth<T>];
            for (int64_t i = 0; i < kWidth<T>; ++i) {
                T* const buffer = block + i * ld;
                from[i] = j + i < count ? row(j + i, buffer) : buffer;
                if (j + i >= count) zero(buffer, ld);
            }
            transpose(from, head_dim, out + column + j, ld_out);
        }
    }
    // The same of rows token(j) of the tensor, zeros for a negative token.
    template <class Token>
    void copy_columns(const Rows& rows, int64_t column, int64_t count, Token token, T* out, int64_t ld_out) {
        const auto row = [&](int64_t j, T* buffer) -> const T* {
            const int64_t t = token(j);
            if (t >= 0) return view_row<S, T>(rows, batch, head, t, head_dim, buffer);
            zero(buffer, ld);
            return buffer;
        };
        transpose_rows(column, count, row, out, ld_out);
    }
    // Columns of a buffer with room for copy_columns of `first` and then others up to `columns`.
    static int64_t column_room(int64_t first, int64_t columns) {
        return scratch_row(first + whole_vectors<T>(whole_vectors<T>(columns) - first));
    }

    // scale * q, and for backward dO, the log-sum-exp and, if the weights of a row will not all be at hand
    // together (`whole` false), delta = dO . O.
    void load_queries(const int32_t* list, int64_t rows, bool whole) {
        for (int64_t r = 0; r < rows; ++r) {
            const bool padding = is_padded(list[r]);
            if (padding)
                zero(query + r * ld, ld);
            else
                load_row<S, T>(p.query, batch, head, list[r], head_dim, query + r * ld,
                               static_cast<T>(p.scale));
            if (!backward) continue;
            lse[r] = static_cast<const T*>(p.logsumexp)[current_bh * tokens + list[r]];
            delta[r] = 0;
            if (padding || lse[r] == infinity<T>()) {
                zero(grad_out + r * ld, ld);
                continue;
            }
            load_row<S, T>(p.grad_output, batch, head, list[r], head_dim, grad_out + r * ld);
            if (!whole)
                delta[r] = dot(grad_out + r * ld,
                               view_row<S, T>(p.output, batch, head, list[r], head_dim, block), head_dim);
        }
    }

    void store_lse(int64_t token, T value) {
        static_cast<T*>(p.logsumexp)[current_bh * tokens + token] = value;
    }
    void zero_gradients(int64_t token) {
        for (const Rows* gradient : {&p.grad_query, &p.grad_key, &p.grad_value})
            zero_row<S>(*gradient, batch, head, token, head_dim);
    }

    T row_maximum(const T* s, int64_t columns, T least = -infinity<T>()) const {
        Vec<T> largest = splat(least);
        for (int64_t j = 0; j < columns; j += kWidth<T>) largest = larger<T>(load(s + j), largest);
        return maximum<T>(largest);
    }

    // What dropout multiplies the weights of a row's entries by.
    const T* kept_entries(int64_t query_token, const int32_t* entries, int64_t columns) {
        Keep keep{p.dropout.seed, p.dropout.threshold, static_cast<uint32_t>(query_token),
                  static_cast<uint32_t>(current_bh)};
        for (int64_t j = 0; j < columns; ++j)
            kept[j] = keep(static_cast<uint32_t>(entries[j])) ? static_cast<T>(p.dropout.scale) : T(0);
        for (int64_t j = columns; j % kWidth<T> != 0; ++j) kept[j] = 0;
        return kept;
    }
    void drop(T* weights, int64_t query_token, const int32_t* entries, int64_t columns) {
        if (!p.dropout.threshold) return;
        const T* factor = kept_entries(query_token, entries, columns);
        for (int64_t j = 0; j < columns; j += kWidth<T>)
            store(weights + j, load(weights + j) * load(factor + j));
    }

    // From scores and dO.v to (dropped) weights and the gradients of the scores, one row in place. A `whole`
    // row is normalised again and delta summed from its weights: where one weight is all but 1, its gradient
    // then cancels, which it does not up to the rounding of O and the log-sum-exp. That is no less than any
    // score, as forward makes the same ones.
    void backward_row(T* s, T* ds, int64_t query_token, int64_t r, const int32_t* entries, int64_t columns,
                      bool whole) {
        const bool normalise = whole && lse[r] != infinity<T>();
        const Vec<T> shift = splat(lse[r]);
        const T* factor = p.dropout.threshold ? kept_entries(query_token, entries, columns) : nullptr;
        Vec<T> total{}, products{};
        for (int64_t j = 0; j < columns; j += kWidth<T>) {
            const Vec<T> weight = exp(load(s + j) - shift);
            store(s + j, weight);
            total += weight;
            if (factor) store(ds + j, load(ds + j) * load(factor + j));
            products += weight * load(ds + j);
        }
        const T scale = normalise ? T(1) / sum<T>(total) : T(1);
        const Vec<T> minus = splat(whole ? sum<T>(products) * scale : delta[r]);
        for (int64_t j = 0; j < columns; j += kWidth<T>) {
            const Vec<T> weight = load(s + j) * splat(scale);
            store(ds + j, weight * (load(ds + j) - minus));
            store(s + j, factor ? weight * load(factor + j) : weight);
        }
    }

    const AttentionParams& p;
    const Geometry& g;
    int64_t head_dim, ld, tokens;
    bool backward;
    int64_t current_bh = -1, batch = 0, head = 0;
    T *query, *grad_out; // [rows, ld]
    T *lse, *delta;      // [rows]
    T* block;            // [kWidth, ld]
    T* kept;             // [columns]
};

template <class S, class T>
class WindowAttention : AttentionTile<S, T> {
    using Tile = AttentionTile<S, T>;
    using Tile::backward;
    using Tile::batch;
    using Tile::current_bh;
    using Tile::delta;
    using Tile::g;
    using Tile::grad_out;
    using Tile::head;
    using Tile::head_dim;
    using Tile::is_padded;
    using Tile::ld;
    using Tile::lse;
    using Tile::p;
    using Tile::query;
    using Tile::tokens;

  public:
    WindowAttention(const AttentionParams& params, bool backward, char* scratch)
        : Tile(params, backward), landmarks(params.num_landmarks),
          globals(params.num_landmarks + g.num_prefix_tokens) {
        const int64_t window = g.window_height * g.window_width;
        const int64_t visible = detail::min(g.window_height + 2 * g.overlap_y, g.grid_height) *
                                detail::min(g.window_width + 2 * g.overlap_x, g.grid_width);
        const int64_t columns = globals + detail::max(visible, window);
        ld_score = detail::max(Tile::column_room(landmarks, globals), Tile::column_room(globals, columns));
        if (g.is_causal) ld_score = scratch_row(columns + 2 * kWidth<T>); // keys may begin at any column
        tile_rows = detail::max(kTileElements / ld_score, kTileRows);
        if (g.is_causal) tile_rows = detail::min(tile_rows, kCausalTileRows);
        tile_rows = detail::ceil_div(window, detail::ceil_div(window, tile_rows)); // even shares
        const int64_t depth = whole_vectors<T>(head_dim);
        Arena arena(scratch);
        Tile::take_queries(arena, tile_rows, ld_score);
        key_t = arena.take<T>(depth * ld_score);
        score = arena.take<T>(tile_rows * ld_score);
        init = arena.take<T>(tile_rows * ld_score);
        if (backward) {
            key_rows = arena.take<T>(columns * ld);
            value_t = arena.take<T>(depth * ld_score);
            grad_score = arena.take<T>(tile_rows * ld_score);
            grad_key = arena.take<T>(window * ld);
            grad_value = arena.take<T>(window * ld);
            const int64_t seen = g.windows_overlap() ? window : 0;
            grad_seen_key = arena.take<T>(seen * ld);
            grad_seen_value = arena.take<T>(seen * ld);
            const int64_t bias_size = p.relative_bias ? g.bias_height * g.bias_width + kWidth<T> : 0;
            grad_bias = arena.take<T>(bias_size);
        } else {
            value_rows = arena.take<T>(columns * ld);
        }
        global_row = arena.take<T>(globals);
        column_token = arena.take<int32_t>(columns);
        for (TokenList* list : {&queries, &keys, &own}) {
            list->token = arena.take<int32_t>(detail::max(visible, window));
            list->place = arena.take<int32_t>(detail::max(visible, window));
            list->run = arena.take<int32_t>(detail::max(visible, window));
        }
        bytes = arena.used();
    }

    size_t bytes;

    void attend(int64_t task, int64_t next) {
        start(task);
        for (int64_t window = first_window; window < last_window; ++window) {
            look_ahead(window, next);
            finish_padding(g.window_box(window), [&](int64_t token) {
                zero_row<S>(p.output, batch, head, token, head_dim);
                Tile::store_lse(token, infinity<T>());
            });
            start_window(window);
            load_keys(g.key_box(window));
            for_queries(true, [&](int64_t i, int64_t rows) {
                const int32_t* list = queries.token + i;
                const int64_t columns = globals + count_visible(i, rows);
                build_init(g.window_box(window), g.key_box(window), i, rows);
                product<T>(rows, columns, head_dim, query, ld, 1, key_t, ld_score, score, ld_score, init,
                           ld_init, [&](int64_t vectors) { fetch_ahead(vectors); });
                for (int64_t r = 0; r < rows; ++r) {
                    fetch_ahead();
                    const int64_t seen = hide_future(i, r, 0, columns);
                    softmax_row(list[r], r, seen);
                    zero_columns(score + r * ld_score, seen, columns);
                }
                T* const out = query; // of no use any more
                product<T>(rows, head_dim, columns, score, ld_score, 1, value_rows, ld, out, ld, nullptr, 0,
                           [&](int64_t vectors) { fetch_ahead(vectors); });
                for (int64_t r = 0; r < rows; ++r)
                    store_row<S, T>(p.output, batch, head, list[r], head_dim, out + r * ld, delta[r]);
            });
        }
    }

    // Gradients of the tokens in this task's windows, and the task's part of its piece's share of those of
    // the global columns.
    void differentiate(int64_t task, int64_t next) {
        start(task);
        const int64_t of_head = task % p.tasks,
                      share = task / p.tasks * p.pieces + of_head / p.tasks_per_piece;
        const bool first_of_piece = of_head + 1 == p.tasks || (of_head + 1) % p.tasks_per_piece == 0;
        const int64_t global_size = (landmarks + g.num_prefix_tokens) * padded(head_dim);
        grad_global_key = static_cast<T*>(p.grad_global_key) + share * global_size;
        grad_global_value = static_cast<T*>(p.grad_global_value) + share * global_size;
        if (global_size > 0 && first_of_piece) {
            zero(grad_global_key, global_size);
            zero(grad_global_value, global_size);
        }
        grad_entropy = nullptr;
        if (p.grad_landmark_entropy) {
            grad_entropy = static_cast<T*>(p.grad_landmark_entropy) + share * landmarks;
            for (int64_t c = 0; c < landmarks && first_of_piece; ++c) grad_entropy[c] = 0;
        }
        const int64_t bias_size = g.bias_height * g.bias_width;
        T* const bias_share = bias ? static_cast<T*>(p.grad_relative_bias) +
                                         (current_bh * p.pieces + of_head / p.tasks_per_piece) * bias_size
                                   : nullptr;
        for (int64_t i = 0; bias && i < bias_size; ++i) grad_bias[i] = first_of_piece ? T(0) : bias_share[i];
        for (int64_t window = first_window; window < last_window; ++window) {
            look_ahead(window, next);
            finish_padding(g.window_box(window), [&](int64_t token) { Tile::zero_gradients(token); });
            list_tokens(g.window_box(window), own);
            if (own.size == 0) continue;
            query_pass(window);
            if (g.windows_overlap()) own_keys_pass(window);
            if (g.num_prefix_tokens > 0) {
                if (g.windows_overlap()) load_keys(g.window_box(window));
                prefix_queries_pass(globals, own.size, grad_key, grad_value, ld);
            }
            for (int64_t j = 0; j < own.size; ++j) {
                store_row<S, T>(p.grad_key, batch, head, own.token[j], head_dim, grad_key + j * ld);
                store_row<S, T>(p.grad_value, batch, head, own.token[j], head_dim, grad_value + j * ld);
            }
        }
        if (of_head == 0) // prefix queries see prefix keys, no landmarks
            prefix_queries_pass(landmarks, g.num_prefix_tokens,
                                grad_global_key + landmarks * padded(head_dim),
                                grad_global_value + landmarks * padded(head_dim), padded(head_dim));
        if (bias) store_elements(grad_bias, bias_size, bias_share);
    }

  private:
    void start(int64_t task) {
        const int64_t bh = p.first_head + task / p.tasks;
        first_window = task % p.tasks * p.windows_per_task;
        last_window = detail::min(first_window + p.windows_per_task, g.num_windows());
        init_shape = {};
        if (bh == current_bh) return;
        Tile::start_head(bh);
        bias = p.relative_bias ? static_cast<const T*>(p.relative_bias) + head * p.relative_bias_head_stride
                               : nullptr;
        loaded_landmarks = 0;
        if (g.is_causal) return;
        load_landmarks(landmarks);
        load_columns(p.key, p.value, landmarks, g.num_prefix_tokens,
                     [&](int64_t t) { return is_padded(t) ? -1 : t; });
        for (int64_t t = 0; t < g.num_prefix_tokens; ++t)
            column_token[landmarks + t] = static_cast<int32_t>(t);
    }

    // The first `count` landmarks; the columns behind them are free for keys.
    void load_landmarks(int64_t count) {
        const int64_t first = loaded_landmarks;
        loaded_landmarks = count;
        if (first >= count) return;
        load_columns(p.landmark_key, p.landmark_value, first, count - first,
                     [&](int64_t j) { return first + j; });
        for (int64_t c = first; c < count; ++c) column_token[c] = static_cast<int32_t>(tokens + c);
    }

    // Keys and values of `count` columns from `column` on.
    template <class Token>
    void load_columns(const Rows& key, const Rows& value, int64_t column, int64_t count, Token token) {
        if (backward) {
            T* const rows = key_rows + column * ld;
            Tile::copy_rows(key, count, token, rows);
            const auto row = [&](int64_t j, T*) { return rows + j * ld; };
            Tile::transpose_rows(column, count, row, key_t, ld_score);
            Tile::copy_columns(value, column, count, token, value_t, ld_score);
        } else {
            Tile::copy_columns(key, column, count, token, key_t, ld_score);
            Tile::copy_rows(value, count, token, value_rows + column * ld);
        }
    }
    // The valid tokens of a box as keys, behind the global columns.
    void load_keys(const Box& box) {
        list_tokens(box, keys);
        load_columns(p.key, p.value, globals, keys.size, [&](int64_t j) { return keys.token[j]; });
        for (int64_t j = 0; j < keys.size; ++j) column_token[globals + j] = keys.token[j];
        keys.find_runs();
    }

    // Valid tokens of a box.
    void list_tokens(const Box& box, TokenList& list) const {
        list.size = 0;
        for (int64_t y = box.y0; y < box.y1; ++y)
            for (int64_t x = box.x0; x < box.x1; ++x) {
                const int64_t token = g.token(y, x);
                if (is_padded(token)) continue;
                list.token[list.size] = static_cast<int32_t>(token);
                list.place[list.size++] = static_cast<int32_t>(y * g.bias_width + x);
            }
    }

    // Begins to look at what is worth having in cache after `window`: the window behind it or, where the
    // whole of its task has been in cache already, its like in the next task.
    void look_ahead(int64_t window, int64_t next) {
        const bool was_cached =
            Blocks(g).count > 1 ||
            (!backward && tokens * head_dim * static_cast<int64_t>(sizeof(S)) <= kCachedBytes);
        const bool last = window + 1 == g.num_windows();
        int64_t bh = current_bh + last, ahead = last ? 0 : window + 1;
        if (was_cached) {
            bh = next < 0 ? p.shape.batch * p.shape.heads : p.first_head + next / p.tasks;
            ahead = next % p.tasks * p.windows_per_task + window - first_window;
        }
        ahead_batch = bh / p.shape.heads;
        ahead_head = bh % p.shape.heads;
        const bool exists = bh < p.shape.batch * p.shape.heads && ahead < g.num_windows();
        ahead_box = exists ? g.window_box(ahead) : Box{0, 0, 0, 0};
        ahead_y = ahead_box.y0;
        ahead_x = ahead_box.x0;
        ahead_tensor = 0;
    }
    // Has some more rows of its tokens brought into cache: few at a time, beside as much arithmetic, as a
    // core waits for a line before it asks for a 17th or so.
    EVA_PREFETCH fetch_ahead(int64_t vectors = kVectorsPerRow) {
        const Rows* const tensors[] = {
            &p.query,      &p.key,      &p.value,     backward ? &p.grad_output : &p.output,
            &p.grad_query, &p.grad_key, &p.grad_value};
        for (; vectors >= kVectorsPerRow && ahead_y < ahead_box.y1; vectors -= kVectorsPerRow) {
            prefetch_token<S>({tensors[ahead_tensor]}, ahead_batch, ahead_head, g.token(ahead_y, ahead_x),
                              head_dim);
            if (++ahead_tensor < (backward ? 7 : 4)) continue;
            ahead_tensor = 0;
            if (++ahead_x == ahead_box.x1) ahead_x = ahead_box.x0, ++ahead_y;
        }
    }

    // The queries of a window, and what they see of the global columns.
    void start_window(int64_t window) {
        list_tokens(g.window_box(window), queries);
        const Box visible = g.key_box(window);
        if (g.is_causal) { // the landmarks that the last query sees, and of those inside of the window none
            const int64_t outside = detail::ceil_div(visible.x0, g.chunk_width);
            const int64_t before = (visible.x1 - 1) / g.chunk_width;
            globals = detail::min(landmarks, p.exclude_window_landmarks ? outside : before);
            load_landmarks(globals);
        }
        const T* given =
            p.landmark_bias ? static_cast<const T*>(p.landmark_bias) + batch * landmarks : nullptr;
        const T* entropy =
            p.landmark_entropy ? static_cast<const T*>(p.landmark_entropy) + current_bh * landmarks : nullptr;
        const int32_t* extents = p.extents ? p.extents + batch * p.extents_batch_stride : nullptr;
        const int64_t seen = detail::min(landmarks, globals);
        for (int64_t c = 0; c < seen; ++c) {
            global_row[c] = (given ? given[c] : T(0)) + (entropy ? entropy[c] : T(0));
            if (!extents) continue;
            const int32_t* e = extents + c * 4;
            const Box members{e[0], e[1], e[2], e[3]};
            if (members.empty() || (p.exclude_window_landmarks && visible.contains(members)))
                global_row[c] = -infinity<T>();
        }
        for (int64_t t = 0; t < g.num_prefix_tokens; ++t)
            global_row[landmarks + t] = is_padded(t) ? -infinity<T>() : T(0);
    }

    // Calls body(first, rows) for the listed queries, a tile at a time, loaded with `whole`.
    template <class Body>
    void for_queries(bool whole, Body body) {
        for (int64_t i = 0; i < queries.size; i += tile_rows) {
            const int64_t rows = detail::min(tile_rows, queries.size - i);
            Tile::load_queries(queries.token + i, rows, whole);
            body(i, rows);
        }
    }

    // How many of the keys the queries [first, first + rows) see: those up to the last one's own, if causal.
    int64_t count_visible(int64_t first, int64_t rows) const {
        if (!g.is_causal || keys.size == 0) return keys.size;
        const int32_t last_query = queries.token[first + rows - 1];
        int64_t count = detail::min(keys.size, detail::max(last_query - keys.token[0] + 1, 0));
        while (count > 0 && keys.token[count - 1] > last_query) --count; // as padding is not listed
        return count;
    }

    // Hides from row r of the tile from query `first` on what comes later; how many of the columns, which are
    // looked at from `begin` on, are left for it.
    int64_t hide_future(int64_t first, int64_t r, int64_t begin, int64_t columns) {
        if (!g.is_causal) return columns;
        T* const s = score + r * ld_score;
        for (int64_t c = queries.token[first + r] / g.chunk_width; c < globals; ++c) s[c] = -infinity<T>();
        const int64_t seen = globals + count_visible(first + r, 1);
        // A whole vector of those from `begin` on, as loads that follow wait for one that is stored across
        // two.
        T* const last = s + begin + (seen - begin) / kWidth<T> * kWidth<T>;
        store(last, among_first<T>(s + seen - last) ? load(last) : splat(-infinity<T>()));
        return seen;
    }
    // Weights of 0 for the columns behind the whole vectors that hold the first `seen`.
    static void zero_columns(T* weights, int64_t seen, int64_t columns) {
        for (int64_t j = whole_vectors<T>(seen); j < columns; j += kWidth<T>) store(weights + j, Vec<T>{});
    }

    // What the scores of queries [first, first + rows) of a window start from, with the keys of a box. Boxes
    // of the same shape share it.
    void build_init(const Box& window, const Box& box, int64_t first, int64_t rows) {
        // Without biases of their own, all queries start from one row.
        const int64_t rows_of_init = bias ? rows : 1;
        ld_init = bias ? ld_score : 0;
        if (!p.key_padding_mask && !p.exclude_window_landmarks && !g.is_causal && rows == queries.size) {
            const InitShape shape{window.height(), window.width(),     box.height(),
                                  box.width(),     window.y0 - box.y0, window.x0 - box.x0};
            if (shape == init_shape) return;
            init_shape = shape;
        } else {
            init_shape = {};
        }
        const int64_t center = (g.bias_height / 2) * g.bias_width + g.bias_width / 2;
        const int64_t visible = count_visible(first, rows);
        const int64_t end = whole_vectors<T>(whole_vectors<T>(globals + visible) - globals);
        for (int64_t r = 0; r < rows_of_init; ++r) {
            T* target = init + r * ld_score;
            for (int64_t c = 0; c < globals; ++c) target[c] = global_row[c];
            target += globals;
            const T* const entry = bias ? bias + center - queries.place[first + r] : nullptr;
            if (entry)
                keys.for_places(visible, [=](int64_t j, int64_t place) { target[j] = entry[place]; });
            else
                zero(target, visible);
            for (int64_t j = visible; j < end; ++j) target[j] = -infinity<T>();
        }
    }

    // Scores to unnormalised weights; leaves 1 / sum in delta (0 for a row that sees nothing).
    void softmax_row(int64_t token, int64_t r, int64_t columns) {
        T* s = score + r * ld_score;
        const T top = Tile::row_maximum(s, columns);
        if (top == -infinity<T>()) {
            zero(s, ld_score);
            delta[r] = 0;
            Tile::store_lse(token, infinity<T>());
            return;
        }
        Vec<T> total{};
        for (int64_t j = 0; j < columns; j += kWidth<T>) {
            const Vec<T> e = exp(load(s + j) - splat(top));
            store(s + j, e);
            total += e;
        }
        const T sum_of_row = sum<T>(total);
        delta[r] = T(1) / sum_of_row;
        Tile::store_lse(token, top + log(sum_of_row));
        Tile::drop(s, token, column_token, columns);
    }

    // Scores of the queries from number i on and columns [first, first + count), which are `whole` rows or
    // not, and their gradients.
    void backward_scores(int64_t i, int64_t rows, int64_t first, int64_t count, bool whole) {
        product<T>(rows, count, head_dim, query, ld, 1, key_t + first, ld_score, score + first, ld_score,
                   init + first, ld_init, [&](int64_t vectors) { fetch_ahead(vectors); });
        product<T>(rows, count, head_dim, grad_out, ld, 1, value_t + first, ld_score, grad_score + first,
                   ld_score, nullptr, 0, [&](int64_t vectors) { fetch_ahead(vectors); });
        for (int64_t r = 0; r < rows; ++r) {
            fetch_ahead();
            const int64_t seen = hide_future(i, r, first, first + count) - first;
            T *const s = score + r * ld_score + first, *const ds = grad_score + r * ld_score + first;
            Tile::backward_row(s, ds, queries.token[i + r], r, column_token + first, seen, whole);
            zero_columns(s, seen, count);
            zero_columns(ds, seen, count);
        }
    }

    // The tile's share of the gradients of keys and values of columns [first, first + count): added to what
    // is there, or in its place.
    void key_gradients(int64_t rows, int64_t first, int64_t count, T* key, T* value, int64_t ld_out,
                       bool add) {
        product<T>(count, head_dim, rows, score + first, 1, ld_score, grad_out, ld, value, ld_out,
                   add ? value : nullptr, ld_out, [&](int64_t vectors) { fetch_ahead(vectors); });
        product<T>(count, head_dim, rows, grad_score + first, 1, ld_score, query, ld, key, ld_out,
                   add ? key : nullptr, ld_out, [&](int64_t vectors) { fetch_ahead(vectors); });
    }

    // The share of the tile from query `first` on in the gradients of the first `visible` keys; the first
    // tile of a window begins the sums.
    void add_own_gradients(int64_t first, int64_t rows, int64_t visible, T* key, T* value) {
        key_gradients(rows, globals, visible, key, value, ld, first > 0);
        if (first > 0) return;
        zero(key + visible * ld, (keys.size - visible) * ld);
        zero(value + visible * ld, (keys.size - visible) * ld);
    }

    // Gradients of the window's queries, of the global columns and, where no windows overlap, of the keys.
    void query_pass(int64_t window) {
        start_window(window);
        load_keys(g.key_box(window));
        for_queries(true, [&](int64_t i, int64_t rows) {
            build_init(g.window_box(window), g.key_box(window), i, rows);
            const int64_t visible = count_visible(i, rows), columns = globals + visible;
            backward_scores(i, rows, 0, columns, true);
            key_gradients(rows, 0, globals, grad_global_key, grad_global_value, padded(head_dim), true);
            if (grad_entropy)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < detail::min(landmarks, globals); ++c)
                        grad_entropy[c] += grad_score[r * ld_score + c];
            if (!g.windows_overlap()) add_own_gradients(i, rows, visible, grad_key, grad_value);
            if (bias) add_bias_gradient(i, rows);
            T* const grad_query = query; // of no use any more
            product<T>(rows, head_dim, columns, grad_score, ld_score, 1, key_rows, ld, grad_query, ld,
                       nullptr, 0, [&](int64_t vectors) { fetch_ahead(vectors); });
            for (int64_t r = 0; r < rows; ++r)
                store_row<S, T>(p.grad_query, batch, head, queries.token[i + r], head_dim,
                                grad_query + r * ld, static_cast<T>(p.scale));
        });
    }

    void add_bias_gradient(int64_t first, int64_t rows) const {
        T* const center = grad_bias + (g.bias_height / 2) * g.bias_width + g.bias_width / 2;
        for (int64_t r = 0; r < rows; ++r) {
            T* const entry = center - queries.place[first + r];
            const T* from = grad_score + r * ld_score + globals;
            keys.for_runs(count_visible(first + r, 1), [=](int64_t j, int64_t place, int64_t length) {
                for (int64_t n = 0; n < length; n += kWidth<T>)
                    store(entry + place + n,
                          load(entry + place + n) + first_lanes<T>(load(from + j + n), length - n));
            });
        }
    }

    // Overlapping windows: gradients of the window's own tokens as keys, from every window that sees them.
    void own_keys_pass(int64_t window) {
        zero(grad_key, own.size * ld);
        zero(grad_value, own.size * ld);
        const Box seeing = g.windows_seeing(window), box = g.window_box(window);
        for (int64_t wy = seeing.y0; wy < seeing.y1; ++wy)
            for (int64_t wx = seeing.x0; wx < seeing.x1; ++wx) {
                const int64_t other = wy * g.window_columns() + wx;
                const Box visible = g.key_box(other);
                const Box seen{detail::max(box.y0, visible.y0), detail::min(box.y1, visible.y1),
                               detail::max(box.x0, visible.x0), detail::min(box.x1, visible.x1)};
                start_window(other);
                load_keys(seen);
                if (queries.size == 0 || keys.size == 0) continue;
                for_queries(false, [&](int64_t i, int64_t rows) {
                    build_init(g.window_box(other), seen, i, rows);
                    const int64_t visible = count_visible(i, rows);
                    backward_scores(i, rows, globals, visible, false);
                    add_own_gradients(i, rows, visible, grad_seen_key, grad_seen_value);
                });
                for (int64_t j = 0, at = 0; j < keys.size; ++j) {
                    while (own.token[at] != keys.token[j]) ++at;
                    add_scaled(grad_key + at * ld, T(1), grad_seen_key + j * ld, head_dim);
                    add_scaled(grad_value + at * ld, T(1), grad_seen_value + j * ld, head_dim);
                }
            }
    }

    // Adds the share of prefix queries, which see every token, to the gradients of columns
    // [first, first + count).
    void prefix_queries_pass(int64_t first, int64_t count, T* key, T* value, int64_t ld_out) {
        for (int64_t t = 0; t < g.num_prefix_tokens; t += tile_rows) {
            queries.size = 0;
            for (int64_t i = t; i < detail::min(t + tile_rows, g.num_prefix_tokens); ++i)
                if (!is_padded(i)) queries.token[queries.size++] = static_cast<int32_t>(i);
            for_queries(false, [&](int64_t i, int64_t rows) {
                init_shape = {};
                ld_init = 0;
                for (int64_t j = first; j < ld_score; ++j) {
                    const bool visible = j < first + count && !is_padded(column_token[j]);
                    init[j] = visible ? T(0) : -infinity<T>();
                }
                backward_scores(i, rows, first, count, false);
                key_gradients(rows, first, count, key, value, ld_out, true);
            });
        }
    }

    template <class Body>
    void finish_padding(const Box& box, Body body) {
        if (!p.key_padding_mask) return;
        for (int64_t y = box.y0; y < box.y1; ++y)
            for (int64_t x = box.x0; x < box.x1; ++x)
                if (is_padded(g.token(y, x))) body(g.token(y, x));
    }

    // What `init` was built for; all 0: for nothing that can be used again.
    struct InitShape {
        int64_t query_height, query_width, key_height, key_width, reach_y, reach_x;
        bool operator==(const InitShape&) const = default;
    };

    int64_t landmarks;        // of the head
    int64_t globals;          // columns before the window's keys: what all its queries may see
    int64_t loaded_landmarks; // in the first columns
    int64_t ld_score, tile_rows;
    int64_t ld_init = 0; // 0: one row for all queries
    int64_t first_window = 0, last_window = 0;
    int64_t ahead_batch, ahead_head, ahead_y, ahead_x; // the next token of what is worth having in cache
    int64_t ahead_tensor;                              // and its next row
    Box ahead_box{0, 0, 0, 0};
    const T* bias = nullptr;                // [bias_height, bias_width]
    T *key_t, *value_t;                     // [head_dim, ld_score]
    T *key_rows, *value_rows;               // [columns, ld]
    T *score, *grad_score, *init;           // [tile_rows, ld_score]
    T *grad_key, *grad_value;               // [window, ld], of the window's own tokens
    T *grad_seen_key, *grad_seen_value;     // [window, ld], of those that one window sees
    T *grad_global_key, *grad_global_value; // [landmarks + prefix, padded D]
    T* grad_entropy = nullptr;              // [landmarks] or null
    T* grad_bias;                           // [bias_height * bias_width] with room for a vector behind
    T* global_row;                          // [globals]: biases, -inf where hidden
    int32_t* column_token;                  // [columns]: entry number in dropout's counter
    TokenList queries, keys, own;
    InitShape init_shape{};
};

// Exact attention of the prefix queries to all tokens.
template <class S, class T>
class PrefixAttention : AttentionTile<S, T> {
    using Tile = AttentionTile<S, T>;
    using Tile::batch;
    using Tile::delta;
    using Tile::g;
    using Tile::grad_out;
    using Tile::head;
    using Tile::head_dim;
    using Tile::is_padded;
    using Tile::ld;
    using Tile::lse;
    using Tile::p;
    using Tile::query;
    using Tile::tokens;

  public:
    PrefixAttention(const AttentionParams& params, bool backward, char* scratch)
        : Tile(params, backward), ld_score(Tile::column_room(0, kPrefixBlock)),
          tile_rows(detail::min(g.num_prefix_tokens, kPrefixBlock)) {
        const int64_t depth = whole_vectors<T>(head_dim);
        Arena arena(scratch);
        Tile::take_queries(arena, tile_rows, ld_score);
        key_t = arena.take<T>(depth * ld_score);
        score = arena.take<T>(tile_rows * ld_score);
        rows_of_block = arena.take<T>(kPrefixBlock * ld);
        out = arena.take<T>(tile_rows * ld);
        value_t = arena.take<T>(backward ? depth * ld_score : 0);
        grad_score = arena.take<T>(backward ? tile_rows * ld_score : 0);
        block_token = arena.take<int32_t>(kPrefixBlock);
        list = arena.take<int32_t>(tile_rows);
        bytes = arena.used();
    }

    size_t bytes;

    void attend(int64_t task) {
        Tile::start_head(p.first_head + task);
        for_tiles([&](int64_t rows) {
            T* const top_of_row = lse;
            for (int64_t r = 0; r < rows; ++r) {
                top_of_row[r] = -infinity<T>();
                delta[r] = 0;
            }
            for_key_blocks(rows, p.value, [&](int64_t count) {
                for (int64_t r = 0; r < rows; ++r) {
                    T* s = score + r * ld_score;
                    const T top = Tile::row_maximum(s, count, top_of_row[r]);
                    if (top == -infinity<T>()) {
                        zero(s, ld_score);
                        continue;
                    }
                    const T correction =
                        static_cast<T>(__builtin_exp(static_cast<double>(top_of_row[r] - top)));
                    Vec<T> total{};
                    for (int64_t j = 0; j < count; j += kWidth<T>) {
                        const Vec<T> e = exp(load(s + j) - splat(top));
                        store(s + j, e);
                        total += e;
                    }
                    delta[r] = delta[r] * correction + sum<T>(total);
                    top_of_row[r] = top;
                    for (int64_t d = 0; d < ld; ++d) out[r * ld + d] *= correction;
                    Tile::drop(s, list[r], block_token, count);
                }
                product<T>(rows, head_dim, count, score, ld_score, 1, rows_of_block, ld, out, ld, out, ld);
            });
            for (int64_t r = 0; r < rows; ++r) {
                const bool empty = delta[r] == 0 || is_padded(list[r]);
                Tile::store_lse(list[r], empty ? infinity<T>() : top_of_row[r] + log(delta[r]));
                if (empty)
                    zero_row<S>(p.output, batch, head, list[r], head_dim);
                else
                    store_row<S, T>(p.output, batch, head, list[r], head_dim, out + r * ld, T(1) / delta[r]);
            }
        });
    }

    // Behind WindowAttention's backward, whose shares of the prefix keys' gradients are added up here.
    void differentiate(int64_t task) {
        Tile::start_head(p.first_head + task);
        for_tiles([&](int64_t rows) {
            for_key_blocks(rows, p.key, [&](int64_t count) {
                product<T>(rows, count, head_dim, grad_out, ld, 1, value_t, ld_score, grad_score, ld_score,
                           nullptr, 0);
                for (int64_t r = 0; r < rows; ++r)
                    Tile::backward_row(score + r * ld_score, grad_score + r * ld_score, list[r], r,
                                       block_token, count, false);
                product<T>(rows, head_dim, count, grad_score, ld_score, 1, rows_of_block, ld, out, ld, out,
                           ld);
            });
            for (int64_t r = 0; r < rows; ++r) {
                if (is_padded(list[r])) {
                    Tile::zero_gradients(list[r]);
                    continue;
                }
                store_row<S, T>(p.grad_query, batch, head, list[r], head_dim, out + r * ld,
                                static_cast<T>(p.scale));
                store_sum(p.grad_global_key, task, p.grad_key, list[r]);
                store_sum(p.grad_global_value, task, p.grad_value, list[r]);
            }
        });
    }

  private:
    void store_sum(const void* shares, int64_t task, const Rows& gradient, int64_t token) {
        const int64_t globals = p.num_landmarks + g.num_prefix_tokens;
        T* const total = Tile::block;
        zero(total, ld);
        for (int64_t piece = 0; piece < p.pieces; ++piece) {
            const int64_t at = (task * p.pieces + piece) * globals + p.num_landmarks + token;
            add_scaled(total, T(1), static_cast<const T*>(shares) + at * padded(head_dim), head_dim);
        }
        store_row<S, T>(gradient, batch, head, token, head_dim, total);
    }

    // All prefix tokens, a tile at a time.
    template <class Body>
    void for_tiles(Body body) {
        for (int64_t t = 0; t < g.num_prefix_tokens; t += tile_rows) {
            const int64_t rows = detail::min(tile_rows, g.num_prefix_tokens - t);
            for (int64_t r = 0; r < rows; ++r) list[r] = static_cast<int32_t>(t + r);
            Tile::load_queries(list, rows, false);
            zero(out, rows * ld);
            body(rows);
        }
    }
    // Blocks of all keys, each with the scores of the loaded queries against it and with the rows of
    // `tensor`.
    template <class Body>
    void for_key_blocks(int64_t rows, const Rows& tensor, Body body) {
        for (int64_t first = 0; first < tokens; first += kPrefixBlock) {
            const int64_t count = detail::min(kPrefixBlock, tokens - first);
            const auto token = [&](int64_t j) { return is_padded(first + j) ? -1 : first + j; };
            Tile::copy_columns(p.key, 0, count, token, key_t, ld_score);
            if (Tile::backward) Tile::copy_columns(p.value, 0, count, token, value_t, ld_score);
            Tile::copy_rows(tensor, count, token, rows_of_block);
            for (int64_t j = 0; j < count; ++j) block_token[j] = static_cast<int32_t>(first + j);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = 0; j < ld_score; ++j)
                    score[r * ld_score + j] = j < count && token(j) >= 0 ? T(0) : -infinity<T>();
            product<T>(rows, count, head_dim, query, ld, 1, key_t, ld_score, score, ld_score, score,
                       ld_score);
            body(count);
        }
    }

    int64_t ld_score, tile_rows;
    T *key_t, *value_t;    // [head_dim, ld_score]
    T* rows_of_block;      // [kPrefixBlock, ld]
    T *score, *grad_score; // [tile_rows, ld_score]
    T* out;                // [tile_rows, ld]
    int32_t* block_token;  // [kPrefixBlock]
    int32_t* list;         // [tile_rows]
};

template <class S, class T>
size_t attention_scratch(const AttentionParams& p, bool backward) {
    return WindowAttention<S, T>(p, backward, nullptr).bytes;
}
template <class S, class T>
size_t prefix_scratch(const AttentionParams& p, bool backward) {
    return PrefixAttention<S, T>(p, backward, nullptr).bytes;
}
template <class S, class T>
void window_attention_fwd(const AttentionParams& p, int64_t begin, int64_t end, int64_t next, char* scratch) {
    WindowAttention<S, T> attention(p, false, scratch);
    for (int64_t task = begin; task < end; ++task) attention.attend(task, task + 1 < end ? task + 1 : next);
}
template <class S, class T>
void window_attention_bwd(const AttentionParams& p, int64_t begin, int64_t end, int64_t next, char* scratch) {
    WindowAttention<S, T> attention(p, true, scratch);
    for (int64_t task = begin; task < end; ++task)
        attention.differentiate(task, task + 1 < end ? task + 1 : next);
}
template <class S, class T>
void prefix_attention_fwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    PrefixAttention<S, T> attention(p, false, scratch);
    for (int64_t task = begin; task < end; ++task) attention.attend(task);
}
template <class S, class T>
void prefix_attention_bwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    PrefixAttention<S, T> attention(p, true, scratch);
    for (int64_t task = begin; task < end; ++task) attention.differentiate(task);
}
