#include "kernels/cpu/params.h"

namespace eva_attn::cpu {

const Kernels& kernels(InstructionSet instruction_set, DType dtype) {
#if defined(__x86_64__)
    switch (instruction_set) {
    case InstructionSet::kAvx512:
        return avx512::table(dtype);
    case InstructionSet::kAvx2:
        return avx2::table(dtype);
    default:
        break;
    }
#endif
    (void)instruction_set;
    return baseline::table(dtype);
}

} // namespace eva_attn::cpu
