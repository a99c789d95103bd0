// Summaries of chunks, forward and backward, and what each member token gets from its chunks' gradients.
// Included once per instruction set, behind simd.h.

// Valid tokens of a chunk.
struct Members {
    int32_t* token; // row-major
    int32_t* place; // in the chunk's box
    int64_t size = 0;

    void list(const Geometry& g, const bool* mask, int64_t batch, int64_t chunk) {
        const Box box = g.chunk_box(chunk);
        size = 0;
        int32_t at = 0;
        for (int64_t y = box.y0; y < box.y1; ++y)
            for (int64_t x = box.x0; x < box.x1; ++x, ++at) {
                if (is_padding(mask, batch, g.num_tokens(), g.token(y, x))) continue;
                token[size] = static_cast<int32_t>(g.token(y, x));
                place[size++] = at;
            }
    }
};

template <class T>
struct SummaryScratch {
    int64_t ld;
    T *key_mean, *query_mean, *key_linear, *query_linear, *key_hat, *query_hat; // [kChunksPerTask, ld]
    T *landmark_key, *landmark_query, *grad_a, *grad_b, *grad_mean;             // [kChunksPerTask, ld]
    T *row, *beta;                                                              // [ld]
    T *key_rstd, *query_rstd, *divisor;                                         // [kChunksPerTask]
    double *weights, *grad_p;                                                   // [members]
    Members members;
    size_t bytes;

    SummaryScratch(const Shape& shape, char* base) : ld(padded(shape.head_dim)) {
        const int64_t size = chunk_size(shape.geometry);
        Arena arena(base);
        for (T** rows : {&key_mean, &query_mean, &key_linear, &query_linear, &key_hat, &query_hat,
                         &landmark_key, &landmark_query, &grad_a, &grad_b, &grad_mean})
            *rows = arena.take<T>(kChunksPerTask * ld);
        row = arena.take<T>(ld);
        beta = arena.take<T>(ld);
        key_rstd = arena.take<T>(kChunksPerTask);
        query_rstd = arena.take<T>(kChunksPerTask);
        divisor = arena.take<T>(kChunksPerTask);
        weights = arena.take<double>(size);
        grad_p = arena.take<double>(size);
        members.token = arena.take<int32_t>(size);
        members.place = arena.take<int32_t>(size);
        bytes = arena.used();
    }
};

template <class S, class T>
inline size_t summary_scratch(const SummaryParams& p) {
    return SummaryScratch<T>(p.shape, nullptr).bytes;
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
        T* h = hat + i * ld;
        T* y = landmark + i * ld;
        if (bias) add_scaled(x, T(1), bias, head_dim);
        if (!norm_weight) {
            for (int64_t d = 0; d < head_dim; d += kWidth<T>) store(y + d, load(x + d));
            continue;
        }
        Vec<T> total{}, squares{};
        for (int64_t d = 0; d < head_dim; d += kWidth<T>) total += load(x + d);
        const Vec<T> center = splat(sum<T>(total) / static_cast<T>(head_dim));
        for (int64_t d = 0; d < head_dim; d += kWidth<T>) {
            const Vec<T> centered = first_lanes<T>(load(x + d) - center, head_dim - d);
            squares += centered * centered;
            store(h + d, centered);
        }
        const T variance = sum<T>(squares) / static_cast<T>(head_dim);
        rstd[i] = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(variance) + eps));
        for (int64_t d = 0; d < head_dim; d += kWidth<T>) {
            const Vec<T> normal = load(h + d) * splat(rstd[i]);
            store(h + d, normal);
            const Vec<T> scaled = normal * load(norm_weight + d);
            store(y + d, norm_bias ? scaled + load(norm_bias + d) : scaled);
        }
    }
}

// scale (omega.k - |k|^2 / 2), of a tangent scale omega.k, in double: logits of chunks grow with the square
// of the norms, and their differences count.
template <class T>
inline double chunk_logit(double scale, bool tangent, const T* omega, const T* key, int64_t head_dim) {
    const Vec<double> half = splat(tangent ? 0.0 : 0.5);
    Vec<double> total{};
    for (int64_t d = 0; d < head_dim; d += kWidth<double>) {
        const Vec<double> k = load_double(key + d);
        total += k * (load_double(omega + d) - k * half);
    }
    return scale * sum<double>(total);
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
    int64_t batch, head, first, count;
    int64_t local_head; // counted from first_head
    int64_t block, end; // and where its chunks end
    int64_t index;      // of the first chunk among all B H C
    int64_t local;      // the same from first_head on

    ChunkGroup(const Shape& shape, int64_t first_head, int64_t task) {
        const int64_t chunks = shape.geometry.num_chunks();
        const Blocks blocks(shape.geometry);
        const int64_t groups = summary_tasks(blocks);
        local_head = task / groups / blocks.count;
        block = task / groups % blocks.count;
        const int64_t bh = first_head + local_head;
        batch = bh / shape.heads;
        head = bh % shape.heads;
        end = detail::min((block + 1) * blocks.chunks, chunks);
        first = detail::min(block * blocks.chunks + task % groups * kChunksPerTask, end);
        count = detail::min(kChunksPerTask, end - first);
        index = bh * chunks + first;
        local = local_head * chunks + first;
    }

    // What is worth having in cache while chunk i is summarised: a chunk some tokens further on, if there is
    // one.
    Box ahead(const Geometry& g, int64_t i) const {
        const int64_t chunk = first + i + detail::ceil_div(8, g.chunk_height * g.chunk_width);
        return chunk < end ? g.chunk_box(chunk) : Box{0, 0, 0, 0};
    }
};

// Has number j of a box's tokens brought into cache.
template <class S>
EVA_PREFETCH prefetch_member(std::initializer_list<const Rows*> tensors, const Shape& shape,
                             const ChunkGroup& group, const Box& box, int64_t j) {
    if (j < box.height() * box.width())
        prefetch_token<S>(tensors, group.batch, group.head,
                          shape.geometry.token(box.y0 + j / box.width(), box.x0 + j % box.width()),
                          shape.head_dim);
}

// The softmax weights of a chunk's members, in double: where one is all but 1, gradients are what is left.
template <class S, class T>
inline void chunk_weights(const SummaryParams& p, const ChunkGroup& group, const SummaryScratch<T>& s,
                          const T* omega) {
    const int64_t head_dim = p.shape.head_dim, count = s.members.size;
    double top = -__builtin_inf();
    for (int64_t j = 0; j < count; ++j) {
        const T* key = view_row<S, T>(p.key, group.batch, group.head, s.members.token[j], head_dim, s.row);
        s.weights[j] = chunk_logit(p.scale, p.tangent, omega, key, head_dim);
        top = s.weights[j] > top ? s.weights[j] : top;
    }
    double total = 0;
    for (int64_t j = 0; j < count; ++j) total += s.weights[j] = __builtin_exp(s.weights[j] - top);
    for (int64_t j = 0; j < count; ++j) s.weights[j] /= total;
}

// Of a weight that is multiplied with it: 0 for 0.
inline double log_weight(double weight) { return weight > 0 ? __builtin_log(weight) : 0; }

template <class S, class T>
void chunk_summary_fwd(const SummaryParams& p, int64_t begin, int64_t end, char* scratch) {
    SummaryScratch<T> s(p.shape, scratch);
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = s.ld;
    const bool has_mu = !p.has_projection || p.has_query_projection;
    for (int64_t task = begin; task < end; ++task) {
        const ChunkGroup group(p.shape, p.first_head, task);
        const auto row = [&](const Rows& rows, int64_t j) {
            return view_row<S, T>(rows, group.batch, group.head, s.members.token[j], head_dim, s.row);
        };
        zero(s.key_mean, group.count * ld);
        zero(s.query_mean, group.count * ld);
        for (int64_t i = 0; i < group.count; ++i) {
            const Box ahead = group.ahead(g, i);
            s.members.list(g, p.key_padding_mask, group.batch, group.first + i);
            const T divisor = mean_divisor<T>(p, s.members.size);
            const auto average = [&](const Rows& rows, T* mean, void* out) {
                for (int64_t j = 0; j < s.members.size; ++j) {
                    prefetch_member<S>({&rows}, p.shape, group, ahead, j);
                    add_scaled(mean, T(1), row(rows, j), head_dim);
                }
                T* saved = static_cast<T*>(out) + (group.index + i) * head_dim;
                for (int64_t d = 0; d < head_dim; ++d) saved[d] = mean[d] = mean[d] / divisor;
            };
            if (!p.tangent) average(p.key, s.key_mean + i * ld, p.key_mean);
            if (has_mu) average(p.query, s.query_mean + i * ld, p.query_mean);
        }
        project(p.key_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.key_mean,
                s.key_linear, s.key_hat, s.key_rstd, s.landmark_key);
        if (has_mu)
            project(p.query_projection, p.has_projection, group.count, head_dim, ld, p.norm_eps, s.query_mean,
                    s.query_linear, s.query_hat, s.query_rstd, s.landmark_query);
        for (int64_t i = 0; i < group.count; ++i) {
            T* landmark = s.landmark_key + i * ld; // 0 of a tangent so far
            T* omega = s.grad_a;
            make_omega(p, has_mu, group.index + i, landmark, s.landmark_query + i * ld, omega);
            if (p.omega_rows)
                store_elements(omega, head_dim, static_cast<T*>(p.omega_rows) + (group.index + i) * head_dim);
            s.members.list(g, p.key_padding_mask, group.batch, group.first + i);
            chunk_weights<S, T>(p, group, s, omega);
            const Box ahead = group.ahead(g, i);
            zero(s.beta, ld);
            for (int64_t j = 0; j < s.members.size; ++j) {
                prefetch_member<S>({&p.value}, p.shape, group, ahead, j);
                add_scaled(s.beta, static_cast<T>(s.weights[j]), row(p.value, j), head_dim);
            }
            if (p.tangent) {
                double entropy = 0;
                for (int64_t j = 0; j < s.members.size; ++j) {
                    add_scaled(landmark, static_cast<T>(s.weights[j]), row(p.key, j), head_dim);
                    entropy -= s.weights[j] * log_weight(s.weights[j]);
                }
                static_cast<T*>(p.landmark_entropy)[group.index + i] = static_cast<T>(entropy);
            }
            store_elements(landmark, head_dim,
                           static_cast<S*>(p.landmark_key) + (group.index + i) * head_dim);
            store_elements(s.beta, head_dim,
                           static_cast<S*>(p.landmark_value) + (group.index + i) * head_dim);
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
            Vec<T> sum_g{}, sum_gh{};
            for (int64_t d = 0; d < head_dim; d += kWidth<T>) {
                const Vec<T> grad = load(gy + d), normal = load(h + d);
                const Vec<T> gh = grad * load(norm_weight + d);
                sum_g += gh;
                sum_gh += gh * normal;
                store(grad_norm_weight + d, load(grad_norm_weight + d) + grad * normal);
                store(grad_norm_bias + d, load(grad_norm_bias + d) + grad);
            }
            const Vec<T> mean_g = splat(sum<T>(sum_g) / static_cast<T>(head_dim));
            const Vec<T> mean_gh = splat(sum<T>(sum_gh) / static_cast<T>(head_dim));
            for (int64_t d = 0; d < head_dim; d += kWidth<T>) {
                const Vec<T> gh = load(gy + d) * load(norm_weight + d);
                const Vec<T> grad = (gh - mean_g - load(h + d) * mean_gh) * splat(rstd[i]);
                store(gx + d, first_lanes<T>(grad, head_dim - d));
            }
        } else {
            for (int64_t d = 0; d < head_dim; d += kWidth<T>) store(gx + d, load(gy + d));
        }
        for (int64_t d = head_dim; d < ld; ++d) gx[d] = 0;
        add_scaled(grad_bias, T(1), gx, head_dim);
    }
    product<T>(count, head_dim, head_dim, grad_linear, ld, 1, static_cast<const T*>(a.weight), ld, grad_mean,
               ld, nullptr, 0);
}

template <class S, class T>
void chunk_summary_bwd(const SummaryParams& p, int64_t begin, int64_t end, char* scratch) {
    SummaryScratch<T> s(p.shape, scratch);
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = s.ld, member_stride = 2 * chunk_size(g);
    const bool has_mu = !p.has_projection || p.has_query_projection;
    const auto rows_of = [&](void* rows, int64_t index) { return static_cast<T*>(rows) + index * ld; };
    for (int64_t task = begin; task < end; ++task) {
        const ChunkGroup group(p.shape, p.first_head, task);
        const auto row = [&](const Rows& rows, int64_t j) {
            return view_row<S, T>(rows, group.batch, group.head, s.members.token[j], head_dim, s.row);
        };
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
            const Box ahead = group.ahead(g, i);
            T* grad_beta = rows_of(p.grad_beta, group.local + i);
            zero(grad_beta, ld);
            for (int64_t piece = group.block / p.blocks_per_piece; piece < p.pieces; ++piece) {
                const int64_t at =
                    group.local_head * p.head_piece_stride + piece * p.piece_stride + (group.first + i) * ld;
                add_scaled(grad_key + i * ld, T(1), static_cast<const T*>(p.grad_landmark_key) + at,
                           head_dim);
                add_scaled(grad_beta, T(1), static_cast<const T*>(p.grad_landmark_value) + at, head_dim);
            }
            T* omega = rows_of(p.omega, group.local + i);
            make_omega(p, has_mu, group.index + i, s.landmark_key + i * ld, s.landmark_query + i * ld, omega);
            s.members.list(g, p.key_padding_mask, group.batch, group.first + i);
            s.divisor[i] = mean_divisor<T>(p, s.members.size);
            chunk_weights<S, T>(p, group, s, omega);
            double grad_entropy = 0;
            for (int64_t piece = group.block / p.blocks_per_piece; p.tangent && piece < p.pieces; ++piece)
                grad_entropy += static_cast<const T*>(
                    p.grad_landmark_entropy)[(group.local_head * p.pieces + piece) * g.num_chunks() +
                                             group.first + i];
            double expectation = 0; // sum_j p_j (gradient of p_j)
            for (int64_t j = 0; j < s.members.size; ++j) {
                prefetch_member<S>({&p.key, &p.value}, p.shape, group, ahead, j);
                s.grad_p[j] = exact_dot(grad_beta, row(p.value, j), head_dim);
                if (p.tangent)
                    s.grad_p[j] += exact_dot(grad_key + i * ld, row(p.key, j), head_dim) -
                                   grad_entropy * log_weight(s.weights[j]);
                expectation += s.weights[j] * s.grad_p[j];
            }
            T* terms = static_cast<T*>(p.member_terms) + (group.local + i) * member_stride;
            T* grad_omega = s.beta;
            zero(grad_omega, ld);
            for (int64_t j = 0; j < s.members.size; ++j) {
                const T grad_product = static_cast<T>(p.scale * s.weights[j] * (s.grad_p[j] - expectation));
                terms[2 * s.members.place[j]] = static_cast<T>(s.weights[j]);
                terms[2 * s.members.place[j] + 1] = grad_product;
                if (has_mu) add_scaled(grad_omega, grad_product, row(p.key, j), head_dim);
            }
            if (!has_mu) continue;
            const T factor = static_cast<T>(p.mu_scale);
            if (!p.tangent) add_scaled(grad_key + i * ld, factor, grad_omega, head_dim);
            add_scaled(grad_query + i * ld, factor, grad_omega, head_dim);
        }
        T* vectors = static_cast<T*>(p.grad_vectors) + task * 6 * ld;
        if (p.has_projection) zero(vectors, 6 * ld);
        const auto finish = [&](const Projection& a, const T* hat, const T* rstd, const T* grad, void* linear,
                                T* sums, void* mean_out, bool is_mean = true) {
            project_backward(a, p.has_projection, group.count, head_dim, ld, hat, rstd, grad,
                             rows_of(linear, group.local), sums, s.grad_mean);
            for (int64_t i = 0; i < group.count; ++i) {
                T* out = rows_of(mean_out, group.local + i);
                for (int64_t d = 0; d < ld; ++d)
                    out[d] = d < head_dim ? s.grad_mean[i * ld + d] / (is_mean ? s.divisor[i] : T(1)) : T(0);
            }
        };
        finish(p.key_projection, s.key_hat, s.key_rstd, grad_key, p.grad_key_linear, vectors, p.grad_key_mean,
               !p.tangent);
        if (has_mu)
            finish(p.query_projection, s.query_hat, s.query_rstd, grad_query, p.grad_query_linear,
                   vectors + 3 * ld, p.grad_query_mean);
        else
            zero(rows_of(p.grad_query_mean, group.local), group.count * ld);
    }
}

template <class S, class T>
inline size_t terms_scratch(const TermsParams& p) {
    return static_cast<size_t>(4 * padded(p.shape.head_dim)) * sizeof(T);
}

// Adds to the tokens' gradients what those of their chunks pass on.
template <class S, class T>
void chunk_terms(const TermsParams& p, int64_t begin, int64_t end, char* scratch) {
    const Geometry& g = p.shape.geometry;
    const int64_t head_dim = p.shape.head_dim, ld = padded(head_dim), size = chunk_size(g);
    const Blocks blocks(g);
    const int64_t tasks = terms_tasks(blocks), columns = g.chunk_columns(), num_chunks = g.num_chunks();
    const bool apart = g.chunk_overlap_y == 0 && g.chunk_overlap_x == 0;
    T* const key_row = reinterpret_cast<T*>(scratch);
    T *const grad_query = key_row + ld, *const grad_key = grad_query + ld, *const grad_value = grad_key + ld;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t local_head = task / tasks / blocks.count, bh = p.first_head + local_head;
        const int64_t block = task / tasks % blocks.count;
        const int64_t batch = bh / p.shape.heads, head = bh % p.shape.heads;
        const int64_t end = detail::min((block + 1) * blocks.tokens, g.grid_height * g.grid_width);
        const int64_t first = block * blocks.tokens + task % tasks * kTokensPerTask;
        Box chunks{}, box{};
        for (int64_t i = first; i < detail::min(first + kTokensPerTask, end); ++i) {
            const int64_t y = i / g.grid_width, x = i % g.grid_width, token = g.token(y, x);
            if (const int64_t ahead = x + 8; ahead < g.grid_width)
                prefetch_token<S>({&p.key, &p.grad_query, &p.grad_key, &p.grad_value}, batch, head,
                                  g.token(y, ahead), head_dim);
            if (is_padding(p.key_padding_mask, batch, g.num_tokens(), token)) continue;
            const T* key = view_row<S, T>(p.key, batch, head, token, head_dim, key_row);
            load_row<S, T>(p.grad_query, batch, head, token, head_dim, grad_query);
            load_row<S, T>(p.grad_key, batch, head, token, head_dim, grad_key);
            load_row<S, T>(p.grad_value, batch, head, token, head_dim, grad_value);
            const bool same = apart && box.contains(y, x); // as the token before, of a chunk that none shares
            if (!same) chunks = g.chunks_of(y, x);
            for (int64_t cy = chunks.y0; cy < chunks.y1; ++cy)
                for (int64_t cx = chunks.x0; cx < chunks.x1; ++cx) {
                    const int64_t chunk = cy * columns + cx;
                    const int64_t index = local_head * num_chunks + chunk;
                    if (!same) box = g.chunk_box(chunk);
                    const int64_t place = (y - box.y0) * box.width() + x - box.x0;
                    const T* terms = static_cast<const T*>(p.member_terms) + 2 * (index * size + place);
                    const T* omega = static_cast<const T*>(p.omega) + index * ld;
                    const T* grad_beta = static_cast<const T*>(p.grad_beta) + index * ld;
                    const T* grad_key_mean = static_cast<const T*>(p.grad_key_mean) + index * ld;
                    const T* grad_query_mean = static_cast<const T*>(p.grad_query_mean) + index * ld;
                    const Vec<T> weight = splat(terms[0]), grad_product = splat(terms[1]);
                    const Vec<T> of_mean = p.tangent ? weight : splat(T(1)); // in k~, or in the mean key
                    const Vec<T> of_norm = splat(p.tangent ? T(0) : T(1));   // of |k|^2 / 2 in the logit
                    for (int64_t d = 0; d < head_dim; d += kWidth<T>) {
                        store(grad_query + d, load(grad_query + d) + load(grad_query_mean + d));
                        store(grad_key + d, load(grad_key + d) + of_mean * load(grad_key_mean + d) +
                                                grad_product * (load(omega + d) - of_norm * load(key + d)));
                        store(grad_value + d, load(grad_value + d) + weight * load(grad_beta + d));
                    }
                }
            store_row<S, T>(p.grad_query, batch, head, token, head_dim, grad_query);
            store_row<S, T>(p.grad_key, batch, head, token, head_dim, grad_key);
            store_row<S, T>(p.grad_value, batch, head, token, head_dim, grad_value);
        }
    }
}

// Rows of the Linear's weight gradient; in blocks, whose rows stay in cache.
template <class T>
void weight_grad(const WeightGradParams& p, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 512;
    const int64_t ld = padded(p.head_dim);
    const int64_t first = begin * kWeightRowsPerTask;
    const int64_t last = detail::min(end * kWeightRowsPerTask, p.head_dim);
    T* const out = static_cast<T*>(p.grad_weight) + first * ld;
    for (int64_t k = 0; k < p.rows; k += kBlock)
        product<T>(last - first, p.head_dim, detail::min(kBlock, p.rows - k),
                   static_cast<const T*>(p.grad_linear) + k * ld + first, 1, ld,
                   static_cast<const T*>(p.mean) + k * ld, ld, out, ld, out, ld);
}
