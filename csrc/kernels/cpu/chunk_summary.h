// Summaries of chunks, forward and backward, and what each member token gets from its chunks' gradients.
// Included once per instruction set, behind simd.h.

template <class T>
struct SummaryScratch {
    int64_t ld;
    T *key_mean, *query_mean, *key_linear, *query_linear, *key_hat, *query_hat; // [kChunksPerTask, ld]
    T *landmark_key, *landmark_query, *grad_a, *grad_b, *grad_mean;             // [kChunksPerTask, ld]
    T *row, *beta;                                                              // [ld]
    T *key_rstd, *query_rstd, *divisor;                                         // [kChunksPerTask]
    double *weights, *grad_p;                                                   // [members]
    int32_t* members;                                                           // [members]
    size_t bytes;

    SummaryScratch(const Shape& shape, char* base) : ld(padded(shape.head_dim)) {
        const Geometry& g = shape.geometry;
        const int64_t members_max = detail::min(g.chunk_height + 2 * g.chunk_overlap_y, g.grid_height) *
                                    detail::min(g.chunk_width + 2 * g.chunk_overlap_x, g.grid_width);
        Arena arena(base);
        for (T** rows : {&key_mean, &query_mean, &key_linear, &query_linear, &key_hat, &query_hat,
                         &landmark_key, &landmark_query, &grad_a, &grad_b, &grad_mean})
            *rows = arena.take<T>(kChunksPerTask * ld);
        row = arena.take<T>(ld);
        beta = arena.take<T>(ld);
        key_rstd = arena.take<T>(kChunksPerTask);
        query_rstd = arena.take<T>(kChunksPerTask);
        divisor = arena.take<T>(kChunksPerTask);
        weights = arena.take<double>(members_max);
        grad_p = arena.take<double>(members_max);
        members = arena.take<int32_t>(members_max);
        bytes = arena.used();
    }
};

template <class S, class T>
inline size_t summary_scratch(const SummaryParams& p) {
    return SummaryScratch<T>(p.shape, nullptr).bytes;
}

// Valid tokens of a chunk, row-major; returns their number.
inline int64_t chunk_members(const Geometry& g, const bool* mask, int64_t batch, int64_t chunk,
                             int32_t* members) {
    const Box box = g.chunk_box(chunk);
    int64_t count = 0;
    for (int64_t y = box.y0; y < box.y1; ++y)
        for (int64_t x = box.x0; x < box.x1; ++x) {
            const int64_t token = g.token(y, x);
            if (!is_padding(mask, batch, g.num_tokens(), token))
                members[count++] = static_cast<int32_t>(token);
        }
    return count;
}

// What the sums over a chunk of `count` valid members are divided by.
template <class T>
inline T mean_divisor(const SummaryParams& p, int64_t count) {
    return static_cast<T>(p.mean_divisor ? p.mean_divisor : detail::max(count, 1));
}

// landmark = A(mean) for `count` rows; keeps what backward needs.
template <class T>
inline void project(const Projection& a, bool has_projection, int64_t count, int64_t head_dim, int64_t ld,
                    double eps, const T* mean, T* linear, T* hat, T* rstd, T* landmark) {
    if (!has_projection) {
        for (int64_t i = 0; i < count * ld; ++i) landmark[i] = mean[i];
        return;
    }
    product<T>(count, head_dim, head_dim, mean, ld, 1, static_cast<const T*>(a.weight_t), ld, linear, ld,
               nullptr, 0);
    const T* bias = static_cast<const T*>(a.bias);
    const T* norm_weight = static_cast<const T*>(a.norm_weight);
    const T* norm_bias = static_cast<const T*>(a.norm_bias);
    for (int64_t i = 0; i < count; ++i) {
        T* x = linear + i * ld;
        if (bias)
            for (int64_t d = 0; d < head_dim; ++d) x[d] += bias[d];
        T* y = landmark + i * ld;
        if (!norm_weight) {
            for (int64_t d = 0; d < head_dim; ++d) y[d] = x[d];
            continue;
        }
        T center = 0;
        for (int64_t d = 0; d < head_dim; ++d) center += x[d];
        center /= static_cast<T>(head_dim);
        T variance = 0;
        for (int64_t d = 0; d < head_dim; ++d) variance += (x[d] - center) * (x[d] - center);
        variance /= static_cast<T>(head_dim);
        rstd[i] = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(variance) + eps));
        for (int64_t d = 0; d < head_dim; ++d) {
            hat[i * ld + d] = (x[d] - center) * rstd[i];
            y[d] = hat[i * ld + d] * norm_weight[d] + (norm_bias ? norm_bias[d] : T(0));
        }
    }
}

template <class T>
inline double chunk_logit(double scale, const T* omega, const T* key, int64_t head_dim) {
    return scale * (exact_dot(omega, key, head_dim) - exact_dot(key, key, head_dim) * 0.5);
}

// omega = c_mu (q~ + k~) + noise, one chunk.
template <class T>
inline void make_omega(const SummaryParams& p, bool has_mu, int64_t chunk_index, const T* landmark_key,
                       const T* landmark_query, T* omega) {
    const int64_t head_dim = p.shape.head_dim;
    const T* noise = p.noise ? static_cast<const T*>(p.noise) + chunk_index * head_dim : nullptr;
    const T factor = static_cast<T>(p.mu_scale);
    for (int64_t d = 0; d < head_dim; ++d) {
        const T mu = has_mu ? factor * (landmark_query[d] + landmark_key[d]) : T(0);
        omega[d] = mu + (noise ? noise[d] : T(0));
    }
    for (int64_t d = head_dim; d % kWidth<T> != 0; ++d) omega[d] = 0;
}

struct ChunkGroup {
    int64_t batch, head, first, count, index; // index: of the first chunk among all B H C

    ChunkGroup(const Shape& shape, int64_t task) {
        const int64_t chunks = shape.geometry.num_chunks();
        const int64_t groups = detail::ceil_div(chunks, kChunksPerTask);
        const int64_t bh = task / groups;
        batch = bh / shape.heads;
        head = bh % shape.heads;
        first = task % groups * kChunksPerTask;
        count = detail::min(kChunksPerTask, chunks - first);
        index = bh * chunks + first;
    }
};

// The logits of the members, then their softmax weights in place; returns the log-sum-exp.
template <class S, class T>
inline double chunk_weights(const SummaryParams& p, const ChunkGroup& group, const SummaryScratch<T>& s,
                            int64_t count, const T* omega) {
    const int64_t head_dim = p.shape.head_dim;
    double maximum = -__builtin_inf();
    for (int64_t j = 0; j < count; ++j) {
        load_row<S, T>(p.key, group.batch, group.head, s.members[j], head_dim, s.row);
        s.weights[j] = chunk_logit(p.scale, omega, s.row, head_dim);
        maximum = s.weights[j] > maximum ? s.weights[j] : maximum;
    }
    double total = 0;
    for (int64_t j = 0; j < count; ++j) total += s.weights[j] = __builtin_exp(s.weights[j] - maximum);
    for (int64_t j = 0; j < count; ++j) s.weights[j] /= total;
    return maximum + __builtin_log(total);
}

template <class S, class T>
void chunk_summary_fwd(const SummaryParams& p, int64_t begin, int64_t end, char* scratch) {
    const SummaryScratch<T> s(p.shape, scratch);
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = s.ld;
    const bool has_mu = !p.has_projection || p.has_query_projection;
    for (int64_t task = begin; task < end; ++task) {
        const ChunkGroup group(p.shape, task);
        zero(s.key_mean, group.count * ld);
        zero(s.query_mean, group.count * ld);
        for (int64_t i = 0; i < group.count; ++i) {
            const int64_t count =
                chunk_members(g, p.key_padding_mask, group.batch, group.first + i, s.members);
            const T divisor = mean_divisor<T>(p, count);
            const auto average = [&](const Rows& rows, T* mean, void* out) {
                for (int64_t j = 0; j < count; ++j) {
                    load_row<S, T>(rows, group.batch, group.head, s.members[j], head_dim, s.row);
                    add_scaled(mean, T(1), s.row, head_dim);
                }
                T* saved = static_cast<T*>(out) + (group.index + i) * head_dim;
                for (int64_t d = 0; d < head_dim; ++d) saved[d] = mean[d] = mean[d] / divisor;
            };
            average(p.key, s.key_mean + i * ld, p.key_mean);
            if (has_mu) average(p.query, s.query_mean + i * ld, p.query_mean);
        }
        project(p.key_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.key_mean,
                s.key_linear, s.key_hat, s.key_rstd, s.landmark_key);
        if (has_mu)
            project(p.query_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.query_mean,
                    s.query_linear, s.query_hat, s.query_rstd, s.landmark_query);
        for (int64_t i = 0; i < group.count; ++i) {
            const T* landmark = s.landmark_key + i * ld;
            S* key_out = static_cast<S*>(p.landmark_key) + (group.index + i) * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) convert(landmark[d], key_out[d]);
            T* omega = s.grad_a;
            make_omega(p, has_mu, group.index + i, landmark, s.landmark_query + i * ld, omega);
            const int64_t count =
                chunk_members(g, p.key_padding_mask, group.batch, group.first + i, s.members);
            if (count > 0) chunk_weights<S, T>(p, group, s, count, omega);
            zero(s.beta, ld);
            for (int64_t j = 0; j < count; ++j) {
                load_row<S, T>(p.value, group.batch, group.head, s.members[j], head_dim, s.row);
                add_scaled(s.beta, static_cast<T>(s.weights[j]), s.row, head_dim);
            }
            S* value_out = static_cast<S*>(p.landmark_value) + (group.index + i) * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) convert(s.beta[d], value_out[d]);
        }
    }
}

// From the gradient of A's output (in place of it: of A's input) for `count` rows; the vectors' gradients add
// up.
template <class T>
inline void project_backward(const Projection& a, bool has_projection, int64_t count, int64_t head_dim,
                             int64_t ld, const T* hat, const T* rstd, const T* grad_landmark, T* grad_linear,
                             T* vectors, T* grad_mean) {
    if (!has_projection) {
        for (int64_t i = 0; i < count * ld; ++i) grad_mean[i] = grad_landmark[i];
        return;
    }
    const T* norm_weight = static_cast<const T*>(a.norm_weight);
    T *grad_bias = vectors, *grad_norm_weight = vectors + ld, *grad_norm_bias = vectors + 2 * ld;
    for (int64_t i = 0; i < count; ++i) {
        const T* gy = grad_landmark + i * ld;
        T* gx = grad_linear + i * ld;
        if (norm_weight) {
            const T* h = hat + i * ld;
            T mean_g = 0, mean_gh = 0;
            for (int64_t d = 0; d < head_dim; ++d) {
                const T gh = gy[d] * norm_weight[d];
                mean_g += gh;
                mean_gh += gh * h[d];
                grad_norm_weight[d] += gy[d] * h[d];
                grad_norm_bias[d] += gy[d];
            }
            mean_g /= static_cast<T>(head_dim);
            mean_gh /= static_cast<T>(head_dim);
            for (int64_t d = 0; d < head_dim; ++d)
                gx[d] = (gy[d] * norm_weight[d] - mean_g - h[d] * mean_gh) * rstd[i];
        } else {
            for (int64_t d = 0; d < head_dim; ++d) gx[d] = gy[d];
        }
        for (int64_t d = head_dim; d < ld; ++d) gx[d] = 0;
        for (int64_t d = 0; d < head_dim; ++d) grad_bias[d] += gx[d];
    }
    product<T>(count, head_dim, head_dim, grad_linear, ld, 1, static_cast<const T*>(a.weight), ld, grad_mean,
               ld, nullptr, 0);
}

template <class S, class T>
void chunk_summary_bwd(const SummaryParams& p, int64_t begin, int64_t end, char* scratch) {
    const SummaryScratch<T> s(p.shape, scratch);
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = s.ld;
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const auto rows_of = [&](void* rows, int64_t index) { return static_cast<T*>(rows) + index * ld; };
    for (int64_t task = begin; task < end; ++task) {
        const ChunkGroup group(p.shape, task);
        const int64_t bh = group.batch * p.shape.heads + group.head;
        const auto restore = [&](const void* saved, T* mean) {
            for (int64_t i = 0; i < group.count; ++i) {
                const T* from = static_cast<const T*>(saved) + (group.index + i) * head_dim;
                for (int64_t d = 0; d < ld; ++d) mean[i * ld + d] = d < head_dim ? from[d] : T(0);
            }
        };
        restore(p.key_mean, s.key_mean);
        project(p.key_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.key_mean,
                s.key_linear, s.key_hat, s.key_rstd, s.landmark_key);
        if (has_mu) {
            restore(p.query_mean, s.query_mean);
            project(p.query_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.query_mean,
                    s.query_linear, s.query_hat, s.query_rstd, s.landmark_query);
        }
        T* grad_key = s.grad_a;
        T* grad_query = s.grad_b;
        zero(grad_key, group.count * ld);
        zero(grad_query, group.count * ld);
        for (int64_t i = 0; i < group.count; ++i) {
            T* grad_beta = rows_of(p.grad_beta, group.index + i);
            zero(grad_beta, ld);
            for (int64_t piece = 0; piece < p.pieces; ++piece) {
                const int64_t at = bh * p.head_piece_stride + piece * p.piece_stride + (group.first + i) * ld;
                add_scaled(grad_key + i * ld, T(1), static_cast<const T*>(p.grad_landmark_key) + at,
                           head_dim);
                add_scaled(grad_beta, T(1), static_cast<const T*>(p.grad_landmark_value) + at, head_dim);
            }
            T* omega = rows_of(p.omega, group.index + i);
            make_omega(p, has_mu, group.index + i, s.landmark_key + i * ld, s.landmark_query + i * ld, omega);
            double* stats = static_cast<double*>(p.chunk_stats) + (group.index + i) * 2;
            stats[0] = stats[1] = 0;
            const int64_t count =
                chunk_members(g, p.key_padding_mask, group.batch, group.first + i, s.members);
            s.divisor[i] = mean_divisor<T>(p, count);
            if (count == 0) continue;
            stats[0] = chunk_weights<S, T>(p, group, s, count, omega);
            for (int64_t j = 0; j < count; ++j) {
                load_row<S, T>(p.value, group.batch, group.head, s.members[j], head_dim, s.row);
                s.grad_p[j] = exact_dot(grad_beta, s.row, head_dim);
                stats[1] += s.weights[j] * s.grad_p[j];
            }
            if (!has_mu) continue;
            T* grad_omega = s.beta;
            zero(grad_omega, ld);
            for (int64_t j = 0; j < count; ++j) {
                load_row<S, T>(p.key, group.batch, group.head, s.members[j], head_dim, s.row);
                add_scaled(grad_omega, static_cast<T>(s.weights[j] * (s.grad_p[j] - stats[1])), s.row,
                           head_dim);
            }
            const T factor = static_cast<T>(p.scale * p.mu_scale);
            add_scaled(grad_key + i * ld, factor, grad_omega, head_dim);
            add_scaled(grad_query + i * ld, factor, grad_omega, head_dim);
        }
        T* vectors = static_cast<T*>(p.grad_vectors) + task * 6 * ld;
        if (p.has_projection) zero(vectors, 6 * ld);
        const auto finish = [&](const Projection& a, const T* hat, const T* rstd, const T* grad, void* linear,
                                T* sums, void* mean_out) {
            project_backward(a, p.has_projection, group.count, head_dim, ld, hat, rstd, grad,
                             rows_of(linear, group.index), sums, s.grad_mean);
            for (int64_t i = 0; i < group.count; ++i) {
                T* out = rows_of(mean_out, group.index + i);
                for (int64_t d = 0; d < ld; ++d)
                    out[d] = d < head_dim ? s.grad_mean[i * ld + d] / s.divisor[i] : T(0);
            }
        };
        finish(p.key_projection, s.key_hat, s.key_rstd, grad_key, p.grad_key_linear, vectors,
               p.grad_key_mean);
        if (has_mu)
            finish(p.query_projection, s.query_hat, s.query_rstd, grad_query, p.grad_query_linear,
                   vectors + 3 * ld, p.grad_query_mean);
        else
            zero(rows_of(p.grad_query_mean, group.index), group.count * ld);
    }
}

// Calls body(index among all B H C) for the chunks that a token is a member of.
template <class Body>
inline void for_chunks_of(const Geometry& g, int64_t bh, int64_t token, Body body) {
    const int64_t position = token - g.num_prefix_tokens;
    const Box chunks = g.chunks_of(position / g.grid_width, position % g.grid_width);
    for (int64_t cy = chunks.y0; cy < chunks.y1; ++cy)
        for (int64_t cx = chunks.x0; cx < chunks.x1; ++cx)
            body(bh * g.num_chunks() + cy * g.chunk_columns() + cx);
}

// Adds to the gradients of one valid token what its chunks' gradients pass on: to those of its key and value,
// given as rows, and of its query.
template <class T>
inline void add_key_value_terms(const Geometry& g, const ChunkTerms& terms, double scale, int64_t bh,
                                int64_t token, int64_t head_dim, int64_t ld, const T* key, const T* value,
                                T* grad_key, T* grad_value) {
    for_chunks_of(g, bh, token, [&](int64_t chunk) {
        const double* stats = static_cast<const double*>(terms.chunk_stats) + chunk * 2;
        const T* omega = static_cast<const T*>(terms.omega) + chunk * ld;
        const T* grad_beta = static_cast<const T*>(terms.grad_beta) + chunk * ld;
        const double weight = __builtin_exp(chunk_logit(scale, omega, key, head_dim) - stats[0]);
        const T grad_logit =
            static_cast<T>(scale * weight * (exact_dot(grad_beta, value, head_dim) - stats[1]));
        add_scaled(grad_value, static_cast<T>(weight), grad_beta, head_dim);
        add_scaled(grad_key, grad_logit, omega, head_dim);
        add_scaled(grad_key, -grad_logit, key, head_dim);
        add_scaled(grad_key, T(1), static_cast<const T*>(terms.grad_key_mean) + chunk * ld, head_dim);
    });
}
template <class T>
inline void add_query_terms(const Geometry& g, const ChunkTerms& terms, int64_t bh, int64_t token,
                            int64_t head_dim, int64_t ld, T* grad_query) {
    for_chunks_of(g, bh, token, [&](int64_t chunk) {
        add_scaled(grad_query, T(1), static_cast<const T*>(terms.grad_query_mean) + chunk * ld, head_dim);
    });
}

template <class S, class T>
inline size_t terms_scratch(const TermsParams& p) {
    return static_cast<size_t>(5 * padded(p.shape.head_dim)) * sizeof(T);
}

// The chunk terms alone, for every token of the (batch, head) pairs [begin, end).
template <class S, class T>
void chunk_terms(const TermsParams& p, int64_t begin, int64_t end, char* scratch) {
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = padded(head_dim);
    T* const key = reinterpret_cast<T*>(scratch);
    T *const value = key + ld, *const grad_query = value + ld, *const grad_key = grad_query + ld,
             *const grad_value = grad_key + ld;
    for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t batch = bh / p.shape.heads, head = bh % p.shape.heads;
        for (int64_t token = 0; token < g.num_tokens(); ++token) {
            zero(grad_query, 3 * ld);
            if (token >= g.num_prefix_tokens &&
                !is_padding(p.key_padding_mask, batch, g.num_tokens(), token)) {
                load_row<S, T>(p.key, batch, head, token, head_dim, key);
                load_row<S, T>(p.value, batch, head, token, head_dim, value);
                add_query_terms(g, p.chunk_terms, bh, token, head_dim, ld, grad_query);
                add_key_value_terms(g, p.chunk_terms, p.scale, bh, token, head_dim, ld, key, value, grad_key,
                                    grad_value);
            }
            store_row<S, T>(p.grad_query, batch, head, token, head_dim, grad_query);
            store_row<S, T>(p.grad_key, batch, head, token, head_dim, grad_key);
            store_row<S, T>(p.grad_value, batch, head, token, head_dim, grad_value);
        }
    }
}

// Rows of the Linear's weight gradient; summed in blocks, which bounds the rounding error.
template <class T>
void weight_grad(const WeightGradParams& p, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 512;
    const int64_t ld = padded(p.head_dim);
    const int64_t first = begin * kWeightRowsPerTask;
    const int64_t last = detail::min(end * kWeightRowsPerTask, p.head_dim);
    T* const out = static_cast<T*>(p.grad_weight) + first * ld;
    zero(out, (last - first) * ld);
    for (int64_t k = 0; k < p.rows; k += kBlock)
        product<T>(last - first, p.head_dim, detail::min(kBlock, p.rows - k),
                   static_cast<const T*>(p.grad_linear) + k * ld + first, 1, ld,
                   static_cast<const T*>(p.mean) + k * ld, ld, out, ld, out, ld);
}
