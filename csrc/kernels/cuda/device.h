// What launches have to know of the current device, asked of the driver once.
#pragma once

#include <array>
#include <cuda_runtime.h>
#include <mutex>

namespace eva_attn::cuda {

// A value for each device, computed the first time that it is the current one.
template <class T>
class PerDevice {
  public:
    template <class F>
    const T& get(F compute) {
        int device = 0;
        cudaGetDevice(&device);
        Slot& slot = slots_[device];
        std::call_once(slot.once, [&] { slot.value = compute(device); });
        return slot.value;
    }

  private:
    struct Slot {
        std::once_flag once;
        T value{};
    };
    static constexpr int kMaxDevices = 256; // more than torch counts
    std::array<Slot, kMaxDevices> slots_;
};

template <cudaDeviceAttr kAttribute>
inline int device_attribute() {
    static PerDevice<int> known;
    return known.get([](int device) {
        int value = 0;
        cudaDeviceGetAttribute(&value, kAttribute, device);
        return value;
    });
}

inline int multiprocessors() {
    const int count = device_attribute<cudaDevAttrMultiProcessorCount>();
    return count > 0 ? count : 1;
}

// What a CTA of a kernel may have on the current device.
struct KernelLimits {
    int threads;      // 0 where the kernel was not compiled for the device
    int shared_bytes; // dynamic
};

// One for each kernel; the kernel is allowed all of the shared memory.
class LimitsOf {
  public:
    template <class Kernel>
    const KernelLimits& operator()(Kernel* kernel) {
        return limits_.get([&](int) {
            cudaFuncAttributes attributes{};
            if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return KernelLimits{0, 0};
            const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>() -
                             static_cast<int>(attributes.sharedSizeBytes);
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
            return KernelLimits{attributes.maxThreadsPerBlock, most};
        });
    }

  private:
    PerDevice<KernelLimits> limits_;
};

} // namespace eva_attn::cuda
