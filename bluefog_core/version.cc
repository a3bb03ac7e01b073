// The version of the library, for programs that load it without headers.
extern "C" const char* bluefog_version() { return BLUEFOG_VERSION; }
