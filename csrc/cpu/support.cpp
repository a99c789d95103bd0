#include "cpu/support.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <algorithm>
#include <c10/core/CPUAllocator.h>

namespace eva_attn::cpu {
namespace {

// As torch does, and so does ATEN_CPU_CAPABILITY.
InstructionSet instruction_set() {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return InstructionSet::kAvx512;
    if (capability == "AVX2") return InstructionSet::kAvx2;
    return InstructionSet::kBaseline;
}

} // namespace

const Kernels& kernels_for(at::ScalarType dtype) {
    static const InstructionSet found = instruction_set();
    return kernels(found, kernel_dtype(dtype));
}

Tensor pad_rows(const Tensor& tensor) {
    std::vector<int64_t> shape = tensor.sizes().vec();
    const int64_t head_dim = shape.back();
    if (head_dim == padded(head_dim)) return tensor.contiguous();
    shape.back() = padded(head_dim);
    const Tensor result = at::zeros(shape, tensor.options());
    result.narrow(-1, 0, head_dim).copy_(tensor);
    return result;
}

ProjectionTensors projection_tensors(const ProjectionWeights& weights, at::ScalarType accumulation) {
    const auto padded_rows = [&](const OptionalTensor& tensor) {
        return tensor ? pad_rows(tensor->to(accumulation)) : Tensor();
    };
    return {.weight = padded_rows(weights.weight),
            .weight_t = weights.weight ? padded_rows(weights.weight->t()) : Tensor(),
            .bias = padded_rows(weights.bias),
            .norm_weight = padded_rows(weights.norm_weight),
            .norm_bias = padded_rows(weights.norm_bias)};
}

Projection projection(const ProjectionTensors& tensors) {
    return {.weight = data(tensors.weight),
            .weight_t = data(tensors.weight_t),
            .bias = data(tensors.bias),
            .norm_weight = data(tensors.norm_weight),
            .norm_bias = data(tensors.norm_bias)};
}

Tensor chunk_extents(const Shape& shape, const Tensor& mask) {
    const Geometry& g = shape.geometry;
    const int64_t batch = mask.defined() ? shape.batch : 1, num_chunks = g.num_chunks();
    const Tensor result = at::empty({batch, num_chunks, 4}, at::kInt);
    int32_t* const out = result.mutable_data_ptr<int32_t>();
    const bool* const padding = mask_data(mask);
    at::parallel_for(0, batch * num_chunks, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            Box extent = g.chunk_box(i % num_chunks);
            if (padding) {
                const bool* const masked = padding + i / num_chunks * g.num_tokens();
                const Box box = extent;
                extent = Box{box.y1, box.y0, box.x1, box.x0};
                for (int64_t y = box.y0; y < box.y1; ++y) {
                    for (int64_t x = box.x0; x < box.x1; ++x) {
                        if (masked[g.token(y, x)]) continue;
                        extent.y0 = std::min(extent.y0, y), extent.y1 = std::max(extent.y1, y + 1);
                        extent.x0 = std::min(extent.x0, x), extent.x1 = std::max(extent.x1, x + 1);
                    }
                }
            }
            if (extent.empty()) extent = Box{0, 0, 0, 0};
            out[4 * i] = extent.y0, out[4 * i + 1] = extent.y1;
            out[4 * i + 2] = extent.x0, out[4 * i + 3] = extent.x1;
        }
    });
    return result;
}

void add_in_order(const Tensor& sum, const Tensor& terms) {
    const Tensor rows = terms.contiguous();
    AT_DISPATCH_FLOATING_TYPES(sum.scalar_type(), "add_in_order", [&] {
        scalar_t* const out = sum.mutable_data_ptr<scalar_t>();
        const scalar_t* row = rows.const_data_ptr<scalar_t>();
        for (int64_t i = 0; i < rows.size(0); ++i, row += sum.numel())
            for (int64_t j = 0; j < sum.numel(); ++j) out[j] += row[j];
    });
}

Tensor sum_in_order(const Tensor& terms) {
    const Tensor sum = at::zeros(terms.sizes().slice(1), terms.options());
    add_in_order(sum, terms);
    return sum;
}

void run(const std::vector<Stage>& stages, int64_t heads, int64_t blocks, Direction direction) {
    const int64_t threads = at::get_num_threads();
    const auto allocate = [](size_t size) { return c10::GetCPUAllocator()->allocate(size); };
    if (heads % threads == 0 || heads >= 4 * threads) { // even shares, or nearly
        size_t size = 0;
        for (const Stage& stage : stages) size = std::max(size, stage.scratch);
        at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
            const c10::DataPtr scratch = allocate(size);
            const int64_t steps = (end - begin) * blocks;
            for (int64_t step = 0; step < steps; ++step) {
                const auto first_task = [&](const Stage& stage, int64_t step) {
                    const int64_t head = begin + step % (end - begin), nth = step / (end - begin);
                    const int64_t block = direction == Direction::kForward ? nth : blocks - 1 - nth;
                    return (head * blocks + block) * (stage.tasks_per_head / blocks);
                };
                for (const Stage& stage : stages) {
                    const int64_t first = first_task(stage, step);
                    stage.kernel(first, first + stage.tasks_per_head / blocks,
                                 step + 1 < steps ? first_task(stage, step + 1) : -1,
                                 static_cast<char*>(scratch.get()));
                }
            }
        });
        return;
    }
    for (const Stage& stage : stages) {
        const int64_t turns = detail::ceil_div(stage.tasks_per_head, stage.in_turn);
        at::parallel_for(0, heads * turns, 1, [&](int64_t begin, int64_t end) {
            const c10::DataPtr scratch = allocate(stage.scratch);
            if (stage.in_turn == 1) return stage.kernel(begin, end, -1, static_cast<char*>(scratch.get()));
            for (int64_t i = begin; i < end; ++i) {
                const int64_t head = i / turns, first = i % turns * stage.in_turn;
                const int64_t last = std::min(first + stage.in_turn, stage.tasks_per_head) - 1;
                for (int64_t task = last; task >= first; --task) {
                    const int64_t at = head * stage.tasks_per_head + task;
                    stage.kernel(at, at + 1, task > first ? at - 1 : -1, static_cast<char*>(scratch.get()));
                }
            }
        });
    }
}

int64_t heads_at_once(int64_t heads) { return std::min<int64_t>(heads, 8 * at::get_num_threads()); }

} // namespace eva_attn::cpu
