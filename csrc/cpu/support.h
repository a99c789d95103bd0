// From torch's tensors to what the kernels take.
#pragma once

#include <functional>
#include <vector>

#include "kernels/cpu/params.h"
#include "ops/kernel_arguments.h"

namespace eva_attn::cpu {

const Kernels& kernels_for(at::ScalarType dtype);

// Rows [..., D] to [..., padded(D)], zeros behind; the tensor itself where it has them.
Tensor pad_rows(const Tensor& tensor);

// What a Projection points into.
struct ProjectionTensors {
    Tensor weight, weight_t, bias, norm_weight, norm_bias;
};
ProjectionTensors projection_tensors(const ProjectionWeights& weights, at::ScalarType accumulation);
Projection projection(const ProjectionTensors& tensors);

// int32 [B or 1, C, 4]; `mask` is bool [B, N], contiguous, or undefined.
Tensor chunk_extents(const Shape& shape, const Tensor& mask);
// Adds the terms along dimension 0, always in the same order.
void add_in_order(const Tensor& sum, const Tensor& terms);
Tensor sum_in_order(const Tensor& terms);

// A kernel with its params: tasks for each (batch, head) in turn, as many for each of its blocks, and the
// scratch that a thread needs. Of each `in_turn` tasks the last one runs first, in one thread.
struct Stage {
    std::function<void(int64_t begin, int64_t end, int64_t next, char* scratch)> kernel;
    int64_t tasks_per_head;
    size_t scratch;
    int64_t in_turn = 1;
};

template <class Params>
Stage stage(void (*kernel)(const Params&, int64_t, int64_t, char*), const Params& params,
            int64_t tasks_per_head, size_t scratch) {
    return {[=, &params](int64_t begin, int64_t end, int64_t, char* memory) {
                kernel(params, begin, end, memory);
            },
            tasks_per_head, scratch};
}
template <class Params>
Stage stage(void (*kernel)(const Params&, int64_t, int64_t, int64_t, char*), const Params& params,
            int64_t tasks_per_head, size_t scratch, int64_t in_turn = 1) {
    return {[=, &params](int64_t begin, int64_t end, int64_t next, char* memory) {
                kernel(params, begin, end, next, memory);
            },
            tasks_per_head, scratch, in_turn};
}

// Runs stages one after another for as many (batch, head)s; where there are many, block by block and head by
// head, so that a stage finds in cache what the one before has read.
enum class Direction { kForward, kBackward }; // backward begins with the last block
void run(const std::vector<Stage>& stages, int64_t heads, int64_t blocks, Direction direction);
// Heads that a backward takes at once: enough for all threads, and few, as memory grows with them.
int64_t heads_at_once(int64_t heads);

} // namespace eva_attn::cpu
