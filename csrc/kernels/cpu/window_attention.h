// Joint attention over [landmarks | prefix keys | window keys], forward and backward. Included once per
// instruction set, behind chunk_summary.h.
//
// Columns of the score tile: landmarks, then prefix keys ("global" columns, the same for every window of a
// head), then the keys of one window. A tile of queries starts from `init` (biases, -inf where hidden), to
// which the matrix product adds scale * q.k; columns behind the last one are -inf, so that their weights are
// 0.

constexpr int64_t kTileElements = 32768; // of the score tile: 128 KB of floats, a fraction of L2
constexpr int64_t kPrefixBlock = 256;    // keys that prefix queries take at a time

// A list of tokens with their places in the bias table.
struct TokenList {
    int32_t* token;
    int32_t* place; // y * bias_width + x
    int64_t size = 0;
};

template <class S, class T>
class JointAttention {
  public:
    JointAttention(const AttentionParams& params, char* scratch)
        : p(params), g(params.shape.geometry), head_dim(params.shape.head_dim),
          ld(padded(params.shape.head_dim)), tokens(g.num_tokens()), landmarks(params.num_landmarks),
          globals(params.num_landmarks + g.num_prefix_tokens) {
        const int64_t window = g.window_height * g.window_width;
        const int64_t keys = detail::min(g.window_height + 2 * g.overlap_y, g.grid_height) *
                             detail::min(g.window_width + 2 * g.overlap_x, g.grid_width);
        const int64_t columns = globals + detail::max(keys, window);
        ld_score = padded(columns);
        tile_rows = detail::max(kTileElements / ld_score, kTileRows);
        tile_rows = detail::min(tile_rows, detail::max(window, g.num_prefix_tokens));
        tile_rows = detail::max(tile_rows, 1);
        Arena arena(scratch);
        key_t = arena.take<T>(head_dim * ld_score);
        value_t = arena.take<T>(head_dim * ld_score);
        key_rows = arena.take<T>(columns * ld);
        value_rows = arena.take<T>(columns * ld);
        query = arena.take<T>(tile_rows * ld);
        grad_out = arena.take<T>(tile_rows * ld);
        out = arena.take<T>(tile_rows * ld);
        score = arena.take<T>(tile_rows * ld_score);
        grad_score = arena.take<T>(tile_rows * ld_score);
        init = arena.take<T>(tile_rows * ld_score);
        grad_key_rows = arena.take<T>(columns * ld);
        grad_value_rows = arena.take<T>(columns * ld);
        lse = arena.take<T>(tile_rows);
        delta = arena.take<T>(tile_rows);
        landmark_row = arena.take<T>(landmarks);
        row = arena.take<T>(2 * ld);
        column_token = arena.take<int32_t>(columns);
        for (TokenList* list : {&queries, &keys_list, &own}) {
            list->token = arena.take<int32_t>(detail::max(keys, window));
            list->place = arena.take<int32_t>(detail::max(keys, window));
        }
        bytes = arena.used();
    }

    size_t bytes;

    void forward(int64_t task) {
        if (!start(task, false)) return;
        for (int64_t window = first_window; window < last_window; ++window) {
            list_tokens(g.window_box(window), queries);
            finish_padding(g.window_box(window));
            if (queries.size == 0) continue;
            list_tokens(g.key_box(window), keys_list);
            load_window_keys(keys_list, globals, false);
            const int64_t columns = globals + keys_list.size;
            prepare_landmark_row(window);
            for (int64_t i = 0; i < queries.size; i += tile_rows) {
                const int64_t rows = detail::min(tile_rows, queries.size - i);
                load_queries(queries.token + i, rows, false);
                build_init(window, i, rows, keys_list);
                product<T>(rows, columns, head_dim, query, ld, 1, key_t, ld_score, score, ld_score, init,
                           ld_score);
                softmax(queries.token + i, rows, columns);
                product<T>(rows, head_dim, columns, score, ld_score, 1, value_rows, ld, out, ld, nullptr, 0);
                for (int64_t r = 0; r < rows; ++r)
                    store_row<S, T>(p.output, batch, head, queries.token[i + r], head_dim, out + r * ld,
                                    delta[r]);
            }
        }
    }

    // Gradients of the global columns, summed over the queries of this task.
    void backward_global(int64_t task) {
        start(task, true);
        zero(grad_key_rows, globals * ld);
        zero(grad_value_rows, globals * ld);
        for (int64_t window = first_window; window < last_window; ++window) {
            list_tokens(g.window_box(window), queries);
            keys_list.size = 0;
            prepare_landmark_row(window);
            for (int64_t i = 0; i < queries.size; i += tile_rows) {
                const int64_t rows = detail::min(tile_rows, queries.size - i);
                load_queries(queries.token + i, rows, true);
                build_init(window, i, rows, keys_list);
                backward_scores(queries.token + i, rows, 0, globals);
                accumulate_key_gradients(rows, score, grad_score, 0, globals);
            }
        }
        if (g.num_prefix_tokens > 0 && task % p.pieces == 0) {
            // Prefix queries see prefix keys, no landmarks.
            for (int64_t c = 0; c < landmarks; ++c) landmark_row[c] = -infinity<T>();
            for_prefix_queries([&](const int32_t* list, int64_t rows) {
                for (int64_t r = 0; r < rows; ++r) fill_global_init(init + r * ld_score, globals);
                init_shape = {};
                backward_scores(list, rows, 0, globals);
                accumulate_key_gradients(rows, score, grad_score, 0, globals);
            });
        }
        T* key_out = static_cast<T*>(p.grad_global_key) + task * globals * ld;
        T* value_out = static_cast<T*>(p.grad_global_value) + task * globals * ld;
        __builtin_memcpy(key_out, grad_key_rows, static_cast<size_t>(globals * ld) * sizeof(T));
        __builtin_memcpy(value_out, grad_value_rows, static_cast<size_t>(globals * ld) * sizeof(T));
    }

    // Gradients of the tokens in this task's windows.
    void backward(int64_t task) {
        const bool any = start(task, true);
        T* bias_out = nullptr;
        if (p.grad_relative_bias) {
            bias_out = static_cast<T*>(p.grad_relative_bias) + task * g.bias_height * g.bias_width;
            zero(bias_out, g.bias_height * g.bias_width);
        }
        if (!any) return;
        for (int64_t window = first_window; window < last_window; ++window) {
            finish_padding_gradients(g.window_box(window));
            list_tokens(g.window_box(window), own);
            if (own.size == 0) continue;
            const bool fused = !g.windows_overlap();
            list_tokens(g.key_box(window), keys_list);
            query_pass(window, bias_out, fused);
            if (!fused) own_keys_pass(window);
            prefix_queries_pass();
            store_key_gradients();
        }
    }

    void prefix_forward(int64_t bh) {
        start_head(bh);
        for_prefix_tiles([&](const int32_t* list, int64_t rows) {
            load_queries(list, rows, false);
            T* maximum = lse;
            for (int64_t r = 0; r < rows; ++r) {
                maximum[r] = -infinity<T>();
                delta[r] = 0;
            }
            zero(out, rows * ld);
            for_key_blocks(rows, [&](int64_t count) {
                for (int64_t r = 0; r < rows; ++r) {
                    T* s = block_score + r * block_ld;
                    T top = maximum[r];
                    for (int64_t j = 0; j < count; ++j) top = s[j] > top ? s[j] : top;
                    if (top == -infinity<T>()) {
                        zero(s, block_ld);
                        continue;
                    }
                    const T correction = static_cast<T>(__builtin_exp(static_cast<double>(maximum[r] - top)));
                    T total = 0;
                    for (int64_t j = 0; j < count; j += kWidth<T>) {
                        const Vec<T> e = exp(load(s + j) - splat(top));
                        store(s + j, e);
                        total += sum<T>(e);
                    }
                    delta[r] = delta[r] * correction + total;
                    maximum[r] = top;
                    for (int64_t d = 0; d < ld; ++d) out[r * ld + d] *= correction;
                    if (p.dropout.threshold) drop(s, list[r], keys_block, count);
                }
                product<T>(rows, head_dim, count, block_score, block_ld, 1, block_value, ld, out, ld, out,
                           ld);
            });
            for (int64_t r = 0; r < rows; ++r) {
                const bool empty = delta[r] == 0 || is_padding(p.key_padding_mask, batch, tokens, list[r]);
                store_lse(list[r],
                          empty ? infinity<T>()
                                : maximum[r] + static_cast<T>(__builtin_log(static_cast<double>(delta[r]))));
                if (empty)
                    zero_row<S>(p.output, batch, head, list[r], head_dim);
                else
                    store_row<S, T>(p.output, batch, head, list[r], head_dim, out + r * ld, T(1) / delta[r]);
            }
        });
    }

    void prefix_backward(int64_t bh) {
        start_head(bh);
        for_prefix_tiles([&](const int32_t* list, int64_t rows) {
            load_queries(list, rows, true);
            zero(out, rows * ld);
            for_key_blocks(rows, [&](int64_t count) {
                product<T>(rows, count, head_dim, grad_out, ld, 1, block_value_t, block_ld, block_grad,
                           block_ld, nullptr, 0);
                for (int64_t r = 0; r < rows; ++r)
                    backward_row(block_score + r * block_ld, block_grad + r * block_ld, list[r], r,
                                 keys_block, count);
                product<T>(rows, head_dim, count, block_grad, block_ld, 1, block_key, ld, out, ld, out, ld);
            });
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t token = list[r];
                if (is_padding(p.key_padding_mask, batch, tokens, token)) {
                    zero_gradients(token);
                    continue;
                }
                store_row<S, T>(p.grad_query, batch, head, token, head_dim, out + r * ld,
                                static_cast<T>(p.scale));
                zero(row, 2 * ld);
                for (int64_t piece = 0; piece < p.pieces; ++piece) {
                    const int64_t at = ((bh * p.pieces + piece) * globals + landmarks + token) * ld;
                    add_scaled(row, T(1), static_cast<const T*>(p.grad_global_key) + at, head_dim);
                    add_scaled(row + ld, T(1), static_cast<const T*>(p.grad_global_value) + at, head_dim);
                }
                store_row<S, T>(p.grad_key, batch, head, token, head_dim, row);
                store_row<S, T>(p.grad_value, batch, head, token, head_dim, row + ld);
            }
        });
    }

    // Further scratch of the prefix kernels, behind the common one.
    static size_t block_bytes(int64_t head_dim, int64_t rows, char* base, JointAttention* self) {
        Arena arena(base);
        const int64_t ld = padded(head_dim), block_ld = padded(kPrefixBlock);
        T* key_t = arena.take<T>(head_dim * block_ld);
        T* value_t = arena.take<T>(head_dim * block_ld);
        T* key = arena.take<T>(kPrefixBlock * ld);
        T* value = arena.take<T>(kPrefixBlock * ld);
        T* score = arena.take<T>(rows * block_ld);
        T* grad = arena.take<T>(rows * block_ld);
        int32_t* keys = arena.take<int32_t>(kPrefixBlock);
        int32_t* list = arena.take<int32_t>(rows);
        if (self) {
            self->block_key_t = key_t;
            self->block_value_t = value_t;
            self->block_key = key;
            self->block_value = value;
            self->block_score = score;
            self->block_grad = grad;
            self->keys_block = keys;
            self->prefix_list = list;
            self->block_ld = block_ld;
        }
        return arena.used();
    }

    int64_t tile_rows;

  private:
    // Loads the global columns; false if the task has no window.
    bool start(int64_t task, bool backward) {
        const int64_t windows = g.num_windows();
        const int64_t bh = task / p.pieces, piece = task % p.pieces;
        first_window = windows * piece / p.pieces;
        last_window = windows * (piece + 1) / p.pieces;
        init_shape = {};
        if (bh != current_bh) {
            start_head(bh);
            load_globals(backward);
        }
        return first_window < last_window;
    }

    void start_head(int64_t bh) {
        current_bh = bh;
        batch = bh / p.shape.heads;
        head = bh % p.shape.heads;
        bias = p.relative_bias ? static_cast<const T*>(p.relative_bias) + head * p.relative_bias_head_stride
                               : nullptr;
    }

    void load_globals(bool backward) {
        const S* keys = static_cast<const S*>(p.landmark_key);
        const S* values = static_cast<const S*>(p.landmark_value);
        for (int64_t c = 0; c < landmarks; ++c) {
            const int64_t at = (current_bh * landmarks + c) * head_dim;
            for (int64_t d = 0; d < ld; ++d) {
                T k = 0, v = 0;
                if (d < head_dim) {
                    convert(keys[at + d], k);
                    convert(values[at + d], v);
                }
                key_rows[c * ld + d] = k;
                value_rows[c * ld + d] = v;
            }
            column_token[c] = static_cast<int32_t>(tokens + c);
        }
        for (int64_t t = 0; t < g.num_prefix_tokens; ++t) {
            const int64_t column = landmarks + t;
            column_token[column] = static_cast<int32_t>(t);
            if (is_padding(p.key_padding_mask, batch, tokens, t)) {
                zero(key_rows + column * ld, ld);
                zero(value_rows + column * ld, ld);
            } else {
                load_row<S, T>(p.key, batch, head, t, head_dim, key_rows + column * ld);
                load_row<S, T>(p.value, batch, head, t, head_dim, value_rows + column * ld);
            }
        }
        transpose(key_rows, ld, globals, head_dim, key_t, ld_score);
        if (backward) transpose(value_rows, ld, globals, head_dim, value_t, ld_score);
        pad_columns(globals);
    }

    // Whole vectors are read behind the last column: they must be finite.
    void pad_columns(int64_t columns) {
        for (int64_t d = 0; d < head_dim; ++d)
            for (int64_t j = columns; j % kWidth<T> != 0; ++j)
                key_t[d * ld_score + j] = value_t[d * ld_score + j] = 0;
    }

    // Valid tokens of a box.
    void list_tokens(const Box& box, TokenList& list) const {
        list.size = 0;
        for (int64_t y = box.y0; y < box.y1; ++y)
            for (int64_t x = box.x0; x < box.x1; ++x) {
                const int64_t token = g.token(y, x);
                if (is_padding(p.key_padding_mask, batch, tokens, token)) continue;
                list.token[list.size] = static_cast<int32_t>(token);
                list.place[list.size++] = static_cast<int32_t>(y * g.bias_width + x);
            }
    }

    // Keys of a list into the columns from `column` on.
    void load_window_keys(const TokenList& list, int64_t column, bool backward) {
        for (int64_t j = 0; j < list.size; ++j) {
            load_row<S, T>(p.key, batch, head, list.token[j], head_dim, key_rows + (column + j) * ld);
            load_row<S, T>(p.value, batch, head, list.token[j], head_dim, value_rows + (column + j) * ld);
            column_token[column + j] = list.token[j];
        }
        transpose(key_rows + column * ld, ld, list.size, head_dim, key_t + column, ld_score);
        if (backward)
            transpose(value_rows + column * ld, ld, list.size, head_dim, value_t + column, ld_score);
        pad_columns(column + list.size);
    }

    // scale * q, and for backward dO, delta = dO . O and the log-sum-exp.
    void load_queries(const int32_t* list, int64_t rows, bool backward) {
        for (int64_t r = 0; r < rows; ++r) {
            const bool padding = is_padding(p.key_padding_mask, batch, tokens, list[r]);
            if (padding)
                zero(query + r * ld, ld);
            else
                load_row<S, T>(p.query, batch, head, list[r], head_dim, query + r * ld,
                               static_cast<T>(p.scale));
            if (!backward) continue;
            lse[r] = static_cast<const T*>(p.logsumexp)[current_bh * tokens + list[r]];
            if (padding || lse[r] == infinity<T>()) {
                zero(grad_out + r * ld, ld);
                delta[r] = 0;
                continue;
            }
            load_row<S, T>(p.grad_output, batch, head, list[r], head_dim, grad_out + r * ld);
            load_row<S, T>(p.output, batch, head, list[r], head_dim, row);
            delta[r] = dot(grad_out + r * ld, row, head_dim);
        }
    }

    void prepare_landmark_row(int64_t window) {
        const T* given =
            p.landmark_bias ? static_cast<const T*>(p.landmark_bias) + batch * landmarks : nullptr;
        const int32_t* extents = p.extents ? p.extents + batch * p.extents_batch_stride : nullptr;
        const Box keys = g.key_box(window);
        for (int64_t c = 0; c < landmarks; ++c) {
            T x = given ? given[c] : T(0);
            if (extents) {
                const int32_t* e = extents + c * 4;
                const Box members{e[0], e[1], e[2], e[3]};
                if (members.empty() || (p.exclude_window_landmarks && keys.contains(members)))
                    x = -infinity<T>();
            }
            landmark_row[c] = x;
        }
    }

    void fill_global_init(T* target, int64_t columns) {
        for (int64_t c = 0; c < landmarks; ++c) target[c] = landmark_row[c];
        for (int64_t t = 0; t < g.num_prefix_tokens; ++t)
            target[landmarks + t] = is_padding(p.key_padding_mask, batch, tokens, t) ? -infinity<T>() : T(0);
        for (int64_t j = columns; j % kWidth<T> != 0; ++j) target[j] = -infinity<T>();
    }

    // What the scores of queries [first, first + rows) start from. Windows of the same shape share it.
    void build_init(int64_t window, int64_t first, int64_t rows, const TokenList& keys) {
        const int64_t columns = globals + keys.size;
        const bool shared =
            !p.key_padding_mask && !p.exclude_window_landmarks && !g.is_causal && rows == queries.size;
        if (shared) {
            const Box q = g.window_box(window), k = g.key_box(window);
            const InitShape shape{q.height(),  q.width(),   k.height(), k.width(),
                                  q.y0 - k.y0, q.x0 - k.x0, columns};
            if (shape == init_shape) return;
            init_shape = shape;
        } else {
            init_shape = {};
        }
        const int64_t base = (g.bias_height / 2) * g.bias_width + g.bias_width / 2;
        for (int64_t r = 0; r < rows; ++r) {
            T* target = init + r * ld_score;
            const int32_t token = queries.token[first + r];
            fill_global_init(target, columns);
            if (g.is_causal)
                for (int64_t c = token / g.chunk_width; c < landmarks; ++c) target[c] = -infinity<T>();
            T* window_part = target + globals;
            if (bias) {
                const T* entry = bias + base - queries.place[first + r];
                for (int64_t j = 0; j < keys.size; ++j) window_part[j] = entry[keys.place[j]];
            } else {
                for (int64_t j = 0; j < keys.size; ++j) window_part[j] = 0;
            }
            if (g.is_causal)
                for (int64_t j = 0; j < keys.size; ++j)
                    if (keys.token[j] > token) window_part[j] = -infinity<T>();
        }
    }

    // Scores to unnormalised weights; leaves 1 / sum in delta (0 for a row that sees nothing).
    void softmax(const int32_t* list, int64_t rows, int64_t columns) {
        for (int64_t r = 0; r < rows; ++r) {
            T* s = score + r * ld_score;
            Vec<T> top = load(s);
            for (int64_t j = kWidth<T>; j < columns; j += kWidth<T>) {
                const Vec<T> x = load(s + j);
                top = x > top ? x : top;
            }
            T maximum = top[0];
            for (int64_t i = 1; i < kWidth<T>; ++i) maximum = top[i] > maximum ? top[i] : maximum;
            if (columns == 0 || maximum == -infinity<T>()) {
                zero(s, ld_score);
                delta[r] = 0;
                store_lse(list[r], infinity<T>());
                continue;
            }
            Vec<T> total{};
            for (int64_t j = 0; j < columns; j += kWidth<T>) {
                const Vec<T> e = exp(load(s + j) - splat(maximum));
                store(s + j, e);
                total += e;
            }
            const T sum_of_row = sum<T>(total);
            delta[r] = T(1) / sum_of_row;
            store_lse(list[r], maximum + static_cast<T>(__builtin_log(static_cast<double>(sum_of_row))));
            if (p.dropout.threshold) drop(s, list[r], column_token, columns);
        }
    }

    void store_lse(int64_t token, T value) {
        static_cast<T*>(p.logsumexp)[current_bh * tokens + token] = value;
    }

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
    Keep keeper(int64_t query_token) const {
        return Keep{p.dropout.seed, p.dropout.threshold, static_cast<uint32_t>(query_token),
                    static_cast<uint32_t>(current_bh)};
    }
    void drop(T* weights, int64_t query_token, const int32_t* entries, int64_t columns) const {
        Keep keep = keeper(query_token);
        const T factor = static_cast<T>(p.dropout.scale);
        for (int64_t j = 0; j < columns; ++j)
            weights[j] = keep(static_cast<uint32_t>(entries[j])) ? weights[j] * factor : T(0);
    }

    // From scores and dO.v to (dropped) weights and the gradients of the scores, one row in place.
    void backward_row(T* s, T* ds, int64_t query_token, int64_t r, const int32_t* entries, int64_t columns) {
        const Vec<T> shift = splat(lse[r]), minus = splat(delta[r]);
        if (!p.dropout.threshold) {
            for (int64_t j = 0; j < columns; j += kWidth<T>) {
                const Vec<T> weight = exp(load(s + j) - shift);
                store(s + j, weight);
                store(ds + j, weight * (load(ds + j) - minus));
            }
            return;
        }
        for (int64_t j = 0; j < columns; j += kWidth<T>) store(s + j, exp(load(s + j) - shift));
        Keep keep = keeper(query_token);
        const T factor = static_cast<T>(p.dropout.scale);
        for (int64_t j = 0; j < columns; ++j) {
            const T kept = keep(static_cast<uint32_t>(entries[j])) ? factor : T(0);
            ds[j] = s[j] * (ds[j] * kept - delta[r]);
            s[j] *= kept;
        }
    }

    // Scores of columns [first, first + columns) into the columns from 0 on, and then to their gradients.
    void backward_scores(const int32_t* list, int64_t rows, int64_t first, int64_t columns) {
        product<T>(rows, columns, head_dim, query, ld, 1, key_t + first, ld_score, score, ld_score,
                   init + first, ld_score);
        product<T>(rows, columns, head_dim, grad_out, ld, 1, value_t + first, ld_score, grad_score, ld_score,
                   nullptr, 0);
        for (int64_t r = 0; r < rows; ++r)
            backward_row(score + r * ld_score, grad_score + r * ld_score, list[r], r, column_token + first,
                         columns);
    }

    // Adds the tile's share of the gradients of columns [first, first + count), whose weights and score
    // gradients start at the two pointers.
    void accumulate_key_gradients(int64_t rows, const T* weights, const T* grad_scores, int64_t first,
                                  int64_t count) {
        T* keys = grad_key_rows + first * ld;
        T* values = grad_value_rows + first * ld;
        product<T>(count, head_dim, rows, weights, 1, ld_score, grad_out, ld, values, ld, values, ld);
        product<T>(count, head_dim, rows, grad_scores, 1, ld_score, query, ld, keys, ld, keys, ld);
    }

    // Gradients of the window's queries; if `fused` those of its keys as well, where the two are the same
    // tokens.
    void query_pass(int64_t window, T* bias_out, bool fused) {
        TokenList saved = queries;
        queries = own;
        load_window_keys(keys_list, globals, true);
        const int64_t columns = globals + keys_list.size;
        if (fused) {
            zero(grad_key_rows + globals * ld, keys_list.size * ld);
            zero(grad_value_rows + globals * ld, keys_list.size * ld);
        }
        prepare_landmark_row(window);
        const int64_t base = (g.bias_height / 2) * g.bias_width + g.bias_width / 2;
        for (int64_t i = 0; i < queries.size; i += tile_rows) {
            const int64_t rows = detail::min(tile_rows, queries.size - i);
            load_queries(queries.token + i, rows, true);
            build_init(window, i, rows, keys_list);
            backward_scores(queries.token + i, rows, 0, columns);
            product<T>(rows, head_dim, columns, grad_score, ld_score, 1, key_rows, ld, out, ld, nullptr, 0);
            if (fused)
                accumulate_key_gradients(rows, score + globals, grad_score + globals, globals,
                                         keys_list.size);
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t token = queries.token[i + r];
                if (bias_out) {
                    T* entry = bias_out + base - queries.place[i + r];
                    const T* from = grad_score + r * ld_score + globals;
                    for (int64_t j = 0; j < keys_list.size; ++j)
                        if (!g.is_causal || keys_list.token[j] <= token) entry[keys_list.place[j]] += from[j];
                }
                T* dq = out + r * ld;
                for (int64_t d = 0; d < head_dim; ++d) dq[d] *= static_cast<T>(p.scale);
                if (p.chunk_terms.omega)
                    add_query_terms(g, p.chunk_terms, current_bh, token, head_dim, ld, dq);
                store_row<S, T>(p.grad_query, batch, head, token, head_dim, dq);
            }
        }
        queries = saved;
    }

    // Overlapping windows: gradients of the window's own tokens as keys, from every window that sees them.
    void own_keys_pass(int64_t window) {
        load_window_keys(own, globals, true);
        zero(grad_key_rows + globals * ld, own.size * ld);
        zero(grad_value_rows + globals * ld, own.size * ld);
        const Box seeing = g.windows_seeing(window);
        for (int64_t wy = seeing.y0; wy < seeing.y1; ++wy)
            for (int64_t wx = seeing.x0; wx < seeing.x1; ++wx) {
                const int64_t other = wy * g.window_columns() + wx;
                const Box visible = g.key_box(other);
                list_tokens(g.window_box(other), queries);
                for (int64_t i = 0; i < queries.size; i += tile_rows) {
                    const int64_t rows = detail::min(tile_rows, queries.size - i);
                    load_queries(queries.token + i, rows, true);
                    init_shape = {};
                    build_init(other, i, rows, own);
                    for (int64_t j = 0; j < own.size; ++j) {
                        const int64_t position = own.token[j] - g.num_prefix_tokens;
                        if (visible.contains(position / g.grid_width, position % g.grid_width)) continue;
                        for (int64_t r = 0; r < rows; ++r) init[r * ld_score + globals + j] = -infinity<T>();
                    }
                    init_shape = {};
                    own_key_gradients(queries.token + i, rows);
                }
            }
    }

    // The tile's share of the gradients of the own keys alone, which lie behind the global columns.
    void own_key_gradients(const int32_t* list, int64_t rows) {
        backward_scores(list, rows, globals, own.size);
        accumulate_key_gradients(rows, score, grad_score, globals, own.size);
    }

    // Prefix queries see every token: their share of the own keys' gradients.
    void prefix_queries_pass() {
        if (g.num_prefix_tokens == 0) return;
        for_prefix_queries([&](const int32_t* list, int64_t rows) {
            for (int64_t r = 0; r < rows; ++r) zero(init + r * ld_score + globals, own.size);
            init_shape = {};
            own_key_gradients(list, rows);
        });
    }

    // Valid prefix queries, loaded for backward, a tile at a time.
    template <class Body>
    void for_prefix_queries(Body body) {
        queries.size = 0;
        const int64_t room = detail::min(tile_rows, g.window_height * g.window_width);
        for (int64_t t = 0; t < g.num_prefix_tokens; ++t) {
            if (!is_padding(p.key_padding_mask, batch, tokens, t))
                queries.token[queries.size++] = static_cast<int32_t>(t);
            if (queries.size == room || (t + 1 == g.num_prefix_tokens && queries.size > 0)) {
                load_queries(queries.token, queries.size, true);
                body(queries.token, queries.size);
                queries.size = 0;
            }
        }
    }

    void finish_padding(const Box& box) {
        if (!p.key_padding_mask) return;
        for_padding(box, [&](int64_t token) {
            zero_row<S>(p.output, batch, head, token, head_dim);
            store_lse(token, infinity<T>());
        });
    }
    void finish_padding_gradients(const Box& box) {
        if (!p.key_padding_mask) return;
        for_padding(box, [&](int64_t token) { zero_gradients(token); });
    }
    void zero_gradients(int64_t token) {
        for (const Rows* gradient : {&p.grad_query, &p.grad_key, &p.grad_value})
            zero_row<S>(*gradient, batch, head, token, head_dim);
    }
    template <class Body>
    void for_padding(const Box& box, Body body) {
        for (int64_t y = box.y0; y < box.y1; ++y)
            for (int64_t x = box.x0; x < box.x1; ++x)
                if (is_padding(p.key_padding_mask, batch, tokens, g.token(y, x))) body(g.token(y, x));
    }

    void store_key_gradients() {
        for (int64_t j = 0; j < own.size; ++j) {
            const int64_t token = own.token[j];
            T* dk = grad_key_rows + (globals + j) * ld;
            T* dv = grad_value_rows + (globals + j) * ld;
            if (p.chunk_terms.omega)
                add_key_value_terms(g, p.chunk_terms, p.scale, current_bh, token, head_dim, ld,
                                    key_rows + (globals + j) * ld, value_rows + (globals + j) * ld, dk, dv);
            store_row<S, T>(p.grad_key, batch, head, token, head_dim, dk);
            store_row<S, T>(p.grad_value, batch, head, token, head_dim, dv);
        }
    }

    // All prefix tokens, a tile at a time.
    template <class Body>
    void for_prefix_tiles(Body body) {
        for (int64_t t = 0; t < g.num_prefix_tokens; t += tile_rows) {
            const int64_t rows = detail::min(tile_rows, g.num_prefix_tokens - t);
            for (int64_t r = 0; r < rows; ++r) prefix_list[r] = static_cast<int32_t>(t + r);
            body(prefix_list, rows);
        }
    }
    // Blocks of all keys, each with the scores of the loaded queries against it.
    template <class Body>
    void for_key_blocks(int64_t rows, Body body) {
        for (int64_t first = 0; first < tokens; first += kPrefixBlock) {
            const int64_t count = detail::min(kPrefixBlock, tokens - first);
            for (int64_t j = 0; j < count; ++j) keys_block[j] = static_cast<int32_t>(first + j);
            load_block(count);
            block_init(rows, count);
            product<T>(rows, count, head_dim, query, ld, 1, block_key_t, block_ld, block_score, block_ld,
                       block_score, block_ld);
            body(count);
        }
    }
    void load_block(int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            if (is_padding(p.key_padding_mask, batch, tokens, keys_block[j])) {
                zero(block_key + j * ld, ld);
                zero(block_value + j * ld, ld);
                continue;
            }
            load_row<S, T>(p.key, batch, head, keys_block[j], head_dim, block_key + j * ld);
            load_row<S, T>(p.value, batch, head, keys_block[j], head_dim, block_value + j * ld);
        }
        zero(block_key_t, head_dim * block_ld);
        zero(block_value_t, head_dim * block_ld);
        transpose(block_key, ld, count, head_dim, block_key_t, block_ld);
        transpose(block_value, ld, count, head_dim, block_value_t, block_ld);
    }
    void block_init(int64_t rows, int64_t count) {
        for (int64_t r = 0; r < rows; ++r) {
            T* target = block_score + r * block_ld;
            for (int64_t j = 0; j < block_ld; ++j)
                target[j] = j < count && !is_padding(p.key_padding_mask, batch, tokens, keys_block[j])
                                ? T(0)
                                : -infinity<T>();
        }
    }

    // What `init` was built for; all 0: for nothing that can be used again.
    struct InitShape {
        int64_t query_height, query_width, key_height, key_width, reach_y, reach_x, columns;
        bool operator==(const InitShape&) const = default;
    };

    const AttentionParams& p;
    const Geometry& g;
    int64_t head_dim, ld, tokens, landmarks, globals, ld_score;
    int64_t current_bh = -1, batch = 0, head = 0, first_window = 0, last_window = 0;
    const T* bias = nullptr;            // [bias_height, bias_width]
    T *key_t, *value_t;                 // [head_dim, ld_score]
    T *key_rows, *value_rows;           // [columns, ld]
    T *query, *grad_out, *out;          // [tile_rows, ld]
    T *score, *grad_score, *init;       // [tile_rows, ld_score]
    T *grad_key_rows, *grad_value_rows; // [columns, ld]
    T *lse, *delta;                     // [tile_rows]
    T* landmark_row;                    // [landmarks]
    T* row;                             // [2, ld]
    int32_t* column_token;              // [columns]: entry number in dropout's counter
    TokenList queries, keys_list, own;
    T *block_key_t, *block_value_t, *block_key, *block_value, *block_score, *block_grad;
    int32_t *keys_block, *prefix_list;
    int64_t block_ld = 0;
    InitShape init_shape{};
};

template <class S, class T>
size_t attention_scratch(const AttentionParams& p) {
    return JointAttention<S, T>(p, nullptr).bytes;
}
template <class S, class T>
size_t prefix_scratch(const AttentionParams& p) {
    JointAttention<S, T> joint(p, nullptr);
    return joint.bytes +
           JointAttention<S, T>::block_bytes(p.shape.head_dim, joint.tile_rows, nullptr, nullptr);
}
template <class S, class T>
void window_attention_fwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    JointAttention<S, T> joint(p, scratch);
    for (int64_t task = begin; task < end; ++task) joint.forward(task);
}
template <class S, class T>
void window_attention_bwd_global(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    JointAttention<S, T> joint(p, scratch);
    for (int64_t task = begin; task < end; ++task) joint.backward_global(task);
}
template <class S, class T>
void window_attention_bwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    JointAttention<S, T> joint(p, scratch);
    for (int64_t task = begin; task < end; ++task) joint.backward(task);
}
template <class S, class T>
void prefix_attention_fwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    JointAttention<S, T> joint(p, scratch);
    JointAttention<S, T>::block_bytes(p.shape.head_dim, joint.tile_rows, scratch + joint.bytes, &joint);
    for (int64_t bh = begin; bh < end; ++bh) joint.prefix_forward(bh);
}
template <class S, class T>
void prefix_attention_bwd(const AttentionParams& p, int64_t begin, int64_t end, char* scratch) {
    JointAttention<S, T> joint(p, scratch);
    JointAttention<S, T>::block_bytes(p.shape.head_dim, joint.tile_rows, scratch + joint.bytes, &joint);
    for (int64_t bh = begin; bh < end; ++bh) joint.prefix_backward(bh);
}
