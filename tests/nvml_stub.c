/* A stand-in for libnvidia-ml.so.1, for tests without a card: two or more cards of known watts.
 *
 * The file named by NVML_STUB is read at every call, so that a test can change the world under a running
 * program. Lines: "cards N", "watts CARD MEAN SWING CYCLE_SECONDS" (a sine around the mean),
 * "tick SECONDS" (of the counter), "offset CARD MILLIJOULES", "frozen CARD MILLIJOULES", "name CARD NAME",
 * "driver VERSION", "mig CARD 0|1", "pid CARD PID" (repeatable), "error FUNCTION CODE" and "field_error CODE".
 * Energy is the exact integral of the watts from the origin of CLOCK_MONOTONIC. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { unsigned field, scope; long long timestamp, latency; unsigned type, status;
                 union { double d; unsigned u; unsigned long long ull; } value; } field_value;
typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } process;

static int handles[8]; /* a device's handle is the address of its slot */
#define CARD(device) ((int)((int *)(device) - handles))
#define EXPORT(name, ...) int name(__VA_ARGS__) { int code = error_of(#name); if (code) return code;

static int look(const char *key, int card, const char *format, void *a, void *b, void *c, int nth) {
    char line[256], word[64];
    FILE *file = fopen(getenv("NVML_STUB"), "r");
    if (!file) return 0;
    int found = 0, at, number;
    while (!found && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s%n", word, &at) != 1 || strcmp(word, key)) continue;
        const char *rest = line + at;
        if (card >= 0) {
            if (sscanf(rest, "%d%n", &number, &at) != 1 || number != card) continue;
            rest += at;
        }
        if (nth-- > 0) continue;
        found = sscanf(rest, format, a, b, c);
    }
    fclose(file);
    return found > 0;
}

static int error_of(const char *function) {
    char name[64];
    int code;
    for (int nth = 0; look("error", -1, "%63s %d", name, &code, NULL, nth); nth++)
        if (!strcmp(name, function)) return code;
    return 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int count(void) { int n = 1; look("cards", -1, "%d", &n, NULL, NULL, 0); return n; }

static double watts(int card, double *swing, double *omega) {
    double mean = 100, cycle = 1;
    *swing = 0;
    look("watts", card, "%lf %lf %lf", &mean, swing, &cycle, 0);
    *omega = 2 * M_PI / cycle;
    return mean;
}

static unsigned milliwatts(int card) {
    double swing, omega, mean = watts(card, &swing, &omega);
    return (unsigned)(1000 * (mean + swing * sin(omega * now())));
}

static void uuid_of(int card, char *text, unsigned size) {
    snprintf(text, size, "GPU-%d%d%d%d0000-1111-2222-3333-44444444444%d", card, card, card, card, card);
}

EXPORT(nvmlInitWithFlags, unsigned flags) return 0; }
EXPORT(nvmlShutdown, void) return 0; }
EXPORT(nvmlSystemGetDriverVersion, char *text, unsigned size)
    char version[64] = "580.1";
    look("driver", -1, "%63s", version, NULL, NULL, 0);
    snprintf(text, size, "%s", version); return 0; }
EXPORT(nvmlDeviceGetCount_v2, unsigned *n) *n = count(); return 0; }
EXPORT(nvmlDeviceGetHandleByIndex_v2, unsigned index, void **device)
    if ((int)index >= count()) return 2;
    *device = &handles[index]; return 0; }
EXPORT(nvmlDeviceGetHandleByUUID, const char *uuid, void **device)
    char text[96];
    for (int card = 0; card < count(); card++) {
        uuid_of(card, text, sizeof text);
        if (!strcmp(text, uuid)) { *device = &handles[card]; return 0; }
    }
    return 6; }
EXPORT(nvmlDeviceGetUUID, void *device, char *text, unsigned size) uuid_of(CARD(device), text, size); return 0; }
EXPORT(nvmlDeviceGetName, void *device, char *text, unsigned size)
    char name[64] = "Stub";
    look("name", CARD(device), "%63s", name, NULL, NULL, 0);
    snprintf(text, size, "%s", name); return 0; }
EXPORT(nvmlDeviceGetTotalEnergyConsumption, void *device, unsigned long long *millijoules)
    double swing, omega, tick = 0.1, t = now(), offset = 0, frozen;
    double mean = watts(CARD(device), &swing, &omega);
    look("tick", -1, "%lf", &tick, NULL, NULL, 0);
    look("offset", CARD(device), "%lf", &offset, NULL, NULL, 0);
    t = floor(t / tick) * tick;
    *millijoules = 1000 * (mean * t - swing / omega * cos(omega * t)) + offset;
    if (look("frozen", CARD(device), "%lf", &frozen, NULL, NULL, 0)) *millijoules = frozen;
    return 0; }
EXPORT(nvmlDeviceGetPowerUsage, void *device, unsigned *power) *power = milliwatts(CARD(device)); return 0; }
EXPORT(nvmlDeviceGetFieldValues, void *device, int n, field_value *values)
    for (int i = 0; i < n; i++) {
        int status = values[i].field == 186 ? 0 : 3;
        look("field_error", -1, "%d", &status, NULL, NULL, 0);
        values[i].type = 1;
        values[i].status = status;
        values[i].value.u = milliwatts(CARD(device));
    }
    return 0; }
EXPORT(nvmlDeviceGetMigMode, void *device, unsigned *current, unsigned *pending)
    *current = 0;
    look("mig", CARD(device), "%u", current, NULL, NULL, 0);
    *pending = *current; return 0; }
EXPORT(nvmlDeviceGetComputeRunningProcesses_v3, void *device, unsigned *n, process *list)
    unsigned have = 0, pid;
    for (; look("pid", CARD(device), "%u", &pid, NULL, NULL, have); have++)
        if (list && have < *n) list[have] = (process){ pid, 0, 0, 0 };
    int short_of = have > (list ? *n : 0);
    *n = have; return short_of ? 7 : 0; }
const char *nvmlErrorString(int code) { static char text[32]; snprintf(text, 32, "stub error %d", code); return text; }
