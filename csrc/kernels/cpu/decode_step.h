// Causal decoding: the heads of a state take in their tokens one by one. Included once per instruction set,
// behind chunk_summary.h.

template <class S, class T>
class DecodingHead {
  public:
    DecodingHead(const DecodeParams& p, char* scratch)
        : p(p), head_dim(p.head_dim), slots(p.window_size + p.overlap) {
        Arena arena(scratch);
        for (T** vector : {&query, &row, &out, &mean, &linear, &hat, &landmark_key, &landmark_query, &omega})
            *vector = arena.take<T>(padded(head_dim));
        logits = arena.take<T>(padded(slots + p.num_landmarks));
        chunk_logits = arena.take<double>(p.chunk_size);
        bytes = arena.used();
    }

    void run(int64_t index) {
        bh = index, batch = index / p.heads, head = index % p.heads;
        const int64_t count = p.num_tokens ? p.num_tokens[batch] : p.tokens;
        for (int64_t token = 0; token < count; ++token) {
            position = p.position[bh] + token;
            append(token);
            attend(token);
            if ((position + 1) % p.chunk_size == 0) end_chunk();
        }
        for (int64_t token = count; token < p.tokens; ++token)
            zero_row<S>(p.output, batch, head, token, head_dim);
        p.position[bh] += count;
    }

    size_t bytes;

  private:
    S* slot(void* window, int64_t i) const {
        return static_cast<S*>(window) + (bh * slots + i % slots) * head_dim;
    }
    S* landmark(void* landmarks, int64_t chunk) const {
        return static_cast<S*>(landmarks) + (bh * p.num_landmarks + chunk) * head_dim;
    }
    T* sum_of(void* sums) const { return static_cast<T*>(sums) + bh * head_dim; }

    // A row of the state in T, zeros behind head_dim up to a whole vector.
    const T* load_state(const S* from) const {
        return view_row<S, T>(Rows{const_cast<S*>(from), 0, 0, 0, 1}, 0, 0, 0, head_dim, row);
    }

    void keep(const Rows& rows, int64_t token, void* window) const {
        const S* from = row_of<S>(rows, batch, head, token);
        S* to = slot(window, position);
        for (int64_t d = 0; d < head_dim; ++d) to[d] = from[d * rows.dim_stride];
    }

    void append(int64_t token) {
        keep(p.key, token, p.window_key);
        keep(p.value, token, p.window_value);
        load_row<S, T>(p.query, batch, head, token, head_dim, query);
        const T* key = load_state(slot(p.window_key, position));
        T *key_sum = sum_of(p.key_sum), *query_sum = sum_of(p.query_sum);
        const bool begins = position % p.chunk_size == 0;
        for (int64_t d = 0; d < head_dim; ++d) {
            key_sum[d] = begins ? key[d] : key_sum[d] + key[d];
            query_sum[d] = begins ? query[d] : query_sum[d] + query[d];
        }
    }

    // Calls body(j, row) for the window's tokens from `first` on, then for landmarks.
    template <class Body>
    void for_visible(int64_t first, int64_t num_landmarks, void* window, void* landmarks, Body body) const {
        const int64_t num_keys = position + 1 - first;
        const int64_t before_wrap = detail::min(num_keys, slots - first % slots);
        const auto rows = [&](const S* from, int64_t begin, int64_t count) {
            for (int64_t j = 0; j < count; ++j) body(begin + j, load_state(from + j * head_dim));
        };
        rows(slot(window, first), 0, before_wrap);
        rows(slot(window, 0), before_wrap, num_keys - before_wrap);
        rows(landmark(landmarks, 0), num_keys, num_landmarks);
    }

    void attend(int64_t token) {
        const int64_t first = detail::max(position / p.window_size * p.window_size - p.overlap, 0);
        const int64_t num_keys = position + 1 - first;
        const int64_t num_landmarks =
            p.exclude_window_landmarks ? detail::ceil_div(first, p.chunk_size) : position / p.chunk_size;
        const int64_t size = num_keys + num_landmarks;
        const T scale = static_cast<T>(p.scale);
        for_visible(first, num_landmarks, p.window_key, p.landmark_key,
                    [&](int64_t j, const T* key) { logits[j] = scale * dot(query, key, head_dim); });
        if (p.relative_bias) {
            const T* bias = static_cast<const T*>(p.relative_bias) + head * p.relative_bias_head_stride +
                            (first - position + slots - 1);
            for (int64_t j = 0; j < num_keys; ++j) logits[j] += bias[j];
        }
        const T* entropy =
            p.landmark_entropy ? static_cast<const T*>(p.landmark_entropy) + bh * p.num_landmarks : nullptr;
        for (int64_t c = 0; c < num_landmarks; ++c)
            logits[num_keys + c] += entropy ? entropy[c] : static_cast<T>(p.landmark_bias);

        T maximum = -infinity<T>();
        for (int64_t j = 0; j < size; ++j) maximum = logits[j] > maximum ? logits[j] : maximum;
        if (maximum == -infinity<T>()) maximum = 0; // all weights are 0 then
        for (int64_t j = size; j % kWidth<T> != 0; ++j) logits[j] = -infinity<T>();
        Vec<T> weights{};
        for (int64_t j = 0; j < size; j += kWidth<T>) {
            const Vec<T> weight = exp(load(logits + j) - splat(maximum));
            store(logits + j, weight);
            weights += weight;
        }
        const T total = sum<T>(weights);
        zero(out, padded(head_dim));
        for_visible(first, num_landmarks, p.window_value, p.landmark_value,
                    [&](int64_t j, const T* value) { add_scaled(out, logits[j], value, head_dim); });
        store_row<S, T>(p.output, batch, head, token, head_dim, out, total == 0 ? T(0) : T(1) / total);
    }

    // Makes the landmark of the chunk whose last token is at `position`.
    void end_chunk() {
        const int64_t chunk = position / p.chunk_size, first = chunk * p.chunk_size;
        const bool has_mu = !p.has_projection || p.has_query_projection;
        project_mean(p.key_projection, sum_of(p.key_sum), landmark_key);
        if (has_mu) project_mean(p.query_projection, sum_of(p.query_sum), landmark_query);
        zero(omega, padded(head_dim));
        const bool tangent = p.landmark_entropy;
        if (tangent) zero(landmark_key, padded(head_dim));
        for (int64_t d = 0; has_mu && d < head_dim; ++d) omega[d] = landmark_query[d] + landmark_key[d];

        double maximum = -__builtin_inf(), total = 0;
        for (int64_t j = 0; j < p.chunk_size; ++j) {
            const T* key = load_state(slot(p.window_key, first + j));
            chunk_logits[j] = chunk_logit(p.scale, tangent, omega, key, head_dim);
            maximum = chunk_logits[j] > maximum ? chunk_logits[j] : maximum;
        }
        for (int64_t j = 0; j < p.chunk_size; ++j)
            total += chunk_logits[j] = __builtin_exp(chunk_logits[j] - maximum);
        zero(out, padded(head_dim));
        double entropy = 0;
        for (int64_t j = 0; j < p.chunk_size; ++j) {
            const double weight = chunk_logits[j] / total;
            add_scaled(out, static_cast<T>(weight), load_state(slot(p.window_value, first + j)), head_dim);
            if (!tangent) continue;
            add_scaled(landmark_key, static_cast<T>(weight), load_state(slot(p.window_key, first + j)),
                       head_dim);
            entropy -= weight * log_weight(weight);
        }
        if (tangent)
            static_cast<T*>(p.landmark_entropy)[bh * p.num_landmarks + chunk] = static_cast<T>(entropy);
        store_elements(landmark_key, head_dim, landmark(p.landmark_key, chunk));
        store_elements(out, head_dim, landmark(p.landmark_value, chunk));
    }

    // landmark = A(mean of the chunk)
    void project_mean(const Projection& a, const T* chunk_sum, T* landmark) const {
        zero(mean, padded(head_dim));
        for (int64_t d = 0; d < head_dim; ++d) mean[d] = chunk_sum[d] / static_cast<T>(p.chunk_size);
        T rstd;
        project(a, p.has_projection, 1, head_dim, padded(head_dim), p.norm_eps, mean, linear, hat, &rstd,
                landmark);
    }

    const DecodeParams& p;
    const int64_t head_dim, slots;
    int64_t bh = 0, batch = 0, head = 0, position = 0;
    T *query, *row, *out;                                           // [padded D]
    T *mean, *linear, *hat, *landmark_key, *landmark_query, *omega; // [padded D]
    T* logits;                                                      // [slots + landmarks]
    double* chunk_logits;                                           // [chunk_size]
};

template <class S, class T>
inline size_t decode_scratch(const DecodeParams& p) {
    return DecodingHead<S, T>(p, nullptr).bytes;
}

template <class S, class T>
void decode_step(const DecodeParams& p, int64_t begin, int64_t end, char* scratch) {
    DecodingHead<S, T> head(p, scratch);
    for (int64_t i = begin; i < end; ++i) head.run(i);
}
