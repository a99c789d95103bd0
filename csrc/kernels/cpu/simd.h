// Vectors, conversions, exp and the register-blocked matrix product. Included once per instruction set,
// behind the target pragma and inside that set's namespace: nothing here may have external linkage. The
// includer defines EVA_VECTOR_BYTES and EVA_VECTOR_COLUMNS (vectors of C per tile of the product).

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(EVA_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(EVA_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t integer __attribute__((vector_size(EVA_VECTOR_BYTES)));
    typedef uint32_t bits __attribute__((vector_size(EVA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(EVA_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(EVA_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t integer __attribute__((vector_size(EVA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kWidth = EVA_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
    return x - Vec<T>{};
}
template <class T>
constexpr T infinity() {
    return static_cast<T>(__builtin_inf());
}

// n rounded up to whole vectors.
template <class T>
constexpr int64_t whole_vectors(int64_t n) {
    return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}
// Rows of a scratch start on different cache sets: an odd number of 16-element lines.
constexpr int64_t scratch_row(int64_t n) { return padded(n) | kLineElements; }

template <class T>
using Lanes = std::make_integer_sequence<int, static_cast<int>(kWidth<T>)>;

// Combines all lanes, halving their number at each step.
template <class T, int Half = kWidth<T> / 2, class Combine, int... I>
inline T reduce(Vec<T> v, Combine combine, std::integer_sequence<int, I...> lanes) {
    v = combine(v, static_cast<Vec<T>>(__builtin_shufflevector(v, v, (I ^ Half)...)));
    if constexpr (Half == 1)
        return v[0];
    else
        return reduce<T, Half / 2>(v, combine, lanes);
}
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
    return a > b ? a : b;
}
template <class T>
inline Vec<T> plus(Vec<T> a, Vec<T> b) {
    return a + b;
}
template <class T>
inline T sum(Vec<T> v) {
    return reduce<T>(v, plus<T>, Lanes<T>{});
}
template <class T>
inline T maximum(Vec<T> v) {
    return reduce<T>(v, larger<T>, Lanes<T>{});
}

// Which lanes are among the first `count`.
template <class T>
inline typename VectorOf<T>::integer among_first(int64_t count) {
    using Integer = typename VectorOf<T>::integer;
    using Lane = std::remove_reference_t<decltype(Integer{}[0])>;
    Integer lane;
    for (int64_t i = 0; i < kWidth<T>; ++i) lane[i] = static_cast<Lane>(i);
    return lane < static_cast<Lane>(count) - Integer{};
}
// The first `count` lanes of x, 0 in the others.
template <class T>
inline Vec<T> first_lanes(Vec<T> x, int64_t count) {
    using Integer = typename VectorOf<T>::integer;
    return reinterpret_cast<Vec<T>>(reinterpret_cast<Integer>(x) & among_first<T>(count));
}

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

inline void convert(float from, float& to) { to = from; }
inline void convert(double from, double& to) { to = from; }
inline void convert(BFloat16 from, float& to) {
    to = bit_cast<float>(static_cast<uint32_t>(from.bits) << 16);
}
inline void convert(float from, BFloat16& to) {
    const uint32_t bits = bit_cast<uint32_t>(from);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void convert(Half from, float& to) {
    const uint32_t magnitude = (from.bits & 0x7fffu) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, of subnormal numbers too.
    uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u));
    bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits;
    to = bit_cast<float>(bits | (static_cast<uint32_t>(from.bits & 0x8000u) << 16));
}
inline void convert(float from, Half& to) {
    const uint32_t bits = bit_cast<uint32_t>(from);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the spacing of subnormal halves.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// exp for arguments up to about 0, where softmax needs it; below the smallest normal number the result is 0.
[[gnu::always_inline]] inline Vec<float> exp(Vec<float> x) {
    using Integer = VectorOf<float>::integer;
    using Bits = VectorOf<float>::bits;
    const Vec<float> magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float> shifted = x * splat(1.44269504f) + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    Vec<float> p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const Bits exponent = reinterpret_cast<Bits>(shifted) << 23;
    const Bits result = reinterpret_cast<Bits>(p) + exponent; // wraps where x is tiny
    const Integer tiny = x < splat(-87.3f);                   // false for NaN, which stays
    return reinterpret_cast<Vec<float>>(result & ~reinterpret_cast<Bits>(tiny));
}
inline Vec<double> exp(Vec<double> x) {
    Vec<double> result{};
    for (int64_t i = 0; i < kWidth<double>; ++i) result[i] = __builtin_exp(x[i]);
    return result;
}

inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }

constexpr int kTileRows = 6;

// C[0:Rows, 0:Columns vectors] = init + A B, where A's element (m, k) lies at a + m * a_m + k * a_k.
template <class T, int Rows, int Columns>
inline void product_tile(int64_t depth, const T* a, int64_t a_m, int64_t a_k, const T* b, int64_t ldb, T* c,
                         int64_t ldc, const T* init, int64_t ldi) {
    Vec<T> accumulator[Rows][Columns];
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n)
            accumulator[m][n] = init ? load(init + m * ldi + n * kWidth<T>) : Vec<T>{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> row[Columns];
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n) row[n] = load(b + k * ldb + n * kWidth<T>);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
            const Vec<T> x = splat(a[m * a_m + k * a_k]);
#pragma GCC unroll 8
            for (int n = 0; n < Columns; ++n) accumulator[m][n] += x * row[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n) store(c + m * ldc + n * kWidth<T>, accumulator[m][n]);
}

template <class T, int Columns, class Beside>
inline void product_rows(int64_t rows, int64_t depth, const T* a, int64_t a_m, int64_t a_k, const T* b,
                         int64_t ldb, T* c, int64_t ldc, const T* init, int64_t ldi, Beside beside) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    int64_t m = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t size = (rows - m + (tiles - tile) - 1) / (tiles - tile); // even shares
        const T* start = init ? init + m * ldi : nullptr;
        beside(depth * Columns);
        const auto run = [&]<int Rows>() {
            product_tile<T, Rows, Columns>(depth, a + m * a_m, a_m, a_k, b, ldb, c + m * ldc, ldc, start,
                                           ldi);
        };
        switch (size) {
        case 1:
            run.template operator()<1>();
            break;
        case 2:
            run.template operator()<2>();
            break;
        case 3:
            run.template operator()<3>();
            break;
        case 4:
            run.template operator()<4>();
            break;
        case 5:
            run.template operator()<5>();
            break;
        default:
            run.template operator()<6>();
            break;
        }
        m += size;
    }
}

struct Nothing {
    void operator()(int64_t) const {}
};

// C [rows, columns] = init + A B. Columns are rounded up to whole vectors: B, C and init have that room.
// init null: zero; init = c: accumulate. beside(vectors of B that it loads) goes with each tile.
template <class T, class Beside = Nothing>
inline void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_m, int64_t a_k,
                    const T* b, int64_t ldb, T* c, int64_t ldc, const T* init, int64_t ldi,
                    Beside beside = {}) {
    if (rows <= 0) return;
    constexpr int64_t kStep = EVA_VECTOR_COLUMNS * kWidth<T>;
    int64_t n = 0;
    for (; n + kStep <= columns; n += kStep)
        product_rows<T, EVA_VECTOR_COLUMNS>(rows, depth, a, a_m, a_k, b + n, ldb, c + n, ldc,
                                            init ? init + n : nullptr, ldi, beside);
    const int64_t left = (columns - n + kWidth<T> - 1) / kWidth<T>;
    const auto run = [&]<int Columns>() {
        product_rows<T, Columns>(rows, depth, a, a_m, a_k, b + n, ldb, c + n, ldc, init ? init + n : nullptr,
                                 ldi, beside);
    };
    switch (left) {
    case 0:
        break;
    case 1:
        run.template operator()<1>();
        break;
    case 2:
        run.template operator()<2>();
        break;
    case 3:
        run.template operator()<3>();
        break;
    default:
        run.template operator()<4>();
        break;
    }
}

// Lanes Start and up of a and b in turn.
template <class T, int Start, int... I>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (Start + I / 2 + I % 2 * static_cast<int>(kWidth<T>))...);
}
// out[d, j] = rows[j][d] for kWidth rows and `depth` columns, rounded up to whole vectors.
template <class T>
inline void transpose(const T* const* rows, int64_t depth, T* out, int64_t ld) {
    constexpr int kRows = static_cast<int>(kWidth<T>);
    for (int64_t d = 0; d < depth; d += kRows) {
        Vec<T> from[kRows], to[kRows];
#pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) to[j] = load(rows[j] + d);
#pragma GCC unroll 4
        for (int round = 1; round < kRows; round *= 2) {
#pragma GCC unroll 16
            for (int j = 0; j < kRows; ++j) from[j] = to[j];
#pragma GCC unroll 8
            for (int j = 0; j < kRows / 2; ++j) {
                to[2 * j] = interleave<T, 0>(from[j], from[j + kRows / 2], Lanes<T>{});
                to[2 * j + 1] = interleave<T, kRows / 2>(from[j], from[j + kRows / 2], Lanes<T>{});
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) store(out + (d + j) * ld, to[j]);
    }
}

// Takes arrays of T out of a scratch; with a null scratch it only counts.
class Arena {
  public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(int64_t n) {
        char* const at = base_ ? base_ + used_ : nullptr;
        used_ += (static_cast<size_t>(n > 0 ? n : 0) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(at);
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

template <class T>
inline void zero(T* p, int64_t n) {
    __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(T));
}

template <class S>
inline S* row_of(const Rows& rows, int64_t batch, int64_t head, int64_t token) {
    return static_cast<S*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride +
           token * rows.token_stride;
}

// A function that only prefetches is, to GCC, one without effect: its calls vanish unless they are inlined
// first.
#define EVA_PREFETCH [[gnu::always_inline]] inline void

// Has a row of each tensor brought into cache, to be read or written: rows lie on pages of their own, where
// no hardware prefetcher follows.
template <class S>
EVA_PREFETCH prefetch_token(std::initializer_list<const Rows*> tensors, int64_t batch, int64_t head,
                            int64_t token, int64_t head_dim) {
    constexpr int64_t kLine = 64 / sizeof(S);
    for (const Rows* rows : tensors) {
        const S* p = row_of<S>(*rows, batch, head, token);
        for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(p + d);
    }
}
// A row in T times `factor`, zeros behind head_dim up to a whole vector.
template <class S, class T>
inline void load_row(const Rows& rows, int64_t batch, int64_t head, int64_t token, int64_t head_dim,
                     T* __restrict buffer, T factor = 1) {
    const S* __restrict p = row_of<S>(rows, batch, head, token);
    const int64_t stride = rows.dim_stride;
    const auto element = [&](int64_t d, int64_t at) {
        T x;
        convert(p[at], x);
        buffer[d] = x * factor;
    };
    if (stride == 1)
        for (int64_t d = 0; d < head_dim; ++d) element(d, d);
    else
        for (int64_t d = 0; d < head_dim; ++d) element(d, d * stride);
    for (int64_t d = head_dim; d % kWidth<T> != 0; ++d) buffer[d] = 0;
}
// The same row where it lies, if it can be read there as whole vectors of T; else loaded into `buffer`.
template <class S, class T>
inline const T* view_row(const Rows& rows, int64_t batch, int64_t head, int64_t token, int64_t head_dim,
                         T* buffer) {
    if constexpr (std::is_same_v<S, T>)
        if (rows.dim_stride == 1 && head_dim % kWidth<T> == 0) return row_of<T>(rows, batch, head, token);
    load_row<S, T>(rows, batch, head, token, head_dim, buffer);
    return buffer;
}
template <class S, class T>
inline void store_elements(const T* __restrict buffer, int64_t n, S* __restrict p, T factor = 1) {
    for (int64_t d = 0; d < n; ++d) convert(buffer[d] * factor, p[d]);
}
template <class S, class T>
inline void store_row(const Rows& rows, int64_t batch, int64_t head, int64_t token, int64_t head_dim,
                      const T* buffer, T factor = 1) {
    S* p = row_of<S>(rows, batch, head, token);
    if (rows.dim_stride == 1)
        store_elements(buffer, head_dim, p, factor);
    else
        for (int64_t d = 0; d < head_dim; ++d) convert(buffer[d] * factor, p[d * rows.dim_stride]);
}
template <class S>
inline void zero_row(const Rows& rows, int64_t batch, int64_t head, int64_t token, int64_t head_dim) {
    S* p = row_of<S>(rows, batch, head, token);
    for (int64_t d = 0; d < head_dim; ++d) p[d * rows.dim_stride] = S{};
}

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
    Vec<T> total{};
    for (int64_t d = 0; d < n; d += kWidth<T>) total += load(a + d) * load(b + d);
    return sum<T>(total);
}
// As many elements as a vector of doubles has.
template <class T, int... I>
inline Vec<double> load_double(const T* p, std::integer_sequence<int, I...> = {}) {
    if constexpr (sizeof...(I) == 0)
        return load_double(p, Lanes<double>{});
    else
        return Vec<double>{static_cast<double>(p[I])...};
}
template <class T>
inline double exact_dot(const T* a, const T* b, int64_t n) {
    Vec<double> total{};
    for (int64_t d = 0; d < n; d += kWidth<double>) total += load_double(a + d) * load_double(b + d);
    return sum<double>(total);
}
// y += a x
template <class T>
inline void add_scaled(T* y, T a, const T* x, int64_t n) {
    const Vec<T> factor = splat(a);
    for (int64_t d = 0; d < n; d += kWidth<T>) store(y + d, load(y + d) + factor * load(x + d));
}

// Is the token padding? `mask` [B, N] or null.
inline bool is_padding(const bool* mask, int64_t batch, int64_t tokens, int64_t token) {
    return mask && mask[batch * tokens + token];
}
