package rollout

import (
	"fmt"
	"slices"
	"strconv"
)

// nameIn is the name of an enumerator, or its number if it has none.
func nameIn(names []string, i int) string {
	if i < len(names) && names[i] != "" {
		return names[i]
	}
	return strconv.Itoa(i)
}

// parseIn sets v to the enumerator called text.
func parseIn(names []string, text []byte, v *uint8) error {
	i := slices.Index(names, string(text))
	if i < 0 || len(text) == 0 {
		return fmt.Errorf("rollout: %q is none of %q", text, names)
	}
	*v = uint8(i)
	return nil
}
