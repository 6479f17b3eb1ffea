// Whether this process may use AMX, the matrix unit of Intel's processors.
#pragma once

namespace torch_mlp {

// Asks the system for the unit, which it gives to who asks, and tries it.
bool has_amx();

}  // namespace torch_mlp
