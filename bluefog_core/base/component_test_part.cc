// Built twice: as a component for component_test, and, with an unresolved symbol, as one that
// cannot load.
extern "C" {

// component_test has a function of this name, too.
int BluefogTestWhoAmI() { return 2; }

#if defined(BLUEFOG_TEST_BROKEN)
int BluefogTestNobodyHasThis();
int BluefogTestFactory() { return BluefogTestNobodyHasThis(); }
#else
int BluefogTestFactory() { return BluefogTestWhoAmI(); }
#endif
}
