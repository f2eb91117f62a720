package rollout

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// A key's file is named by the key, with every byte but a-z, 0-9, '-' and '_'
// escaped as "%" and two lower-case hexadecimal digits, and dirSuffix. So names
// do not differ by case only, and none begins with a dot. If that has more
// than maxDirName bytes, the name is its beginning, "~", a SHA-256 of the key
// in hexadecimal, and dirSuffix; the key is then found in the file only.
func dirKeyName(key string) string {
	name := dirEscape(key)
	if len(name)+len(dirSuffix) > maxDirName {
		sum := sha256.Sum256([]byte(key))
		name = name[:dirLongCut] + "~" + hex.EncodeToString(sum[:])
	}
	return name + dirSuffix
}

const (
	maxDirName = 200
	dirLongCut = maxDirName - len(dirSuffix) - 1 - 2*sha256.Size
)

// dirEscape escapes byte by byte: a prefix of a key becomes a prefix.
func dirEscape(s string) string {
	const digits = "0123456789abcdef"
	b := make([]byte, 0, 3*len(s))
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
			b = append(b, c)
		default:
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return string(b)
}

// dirUnescape reports false if s is not what dirEscape makes of any string.
func dirUnescape(s string) (string, bool) {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b = append(b, s[i])
			continue
		}
		if i+3 > len(s) {
			return "", false
		}
		c, err := hex.DecodeString(s[i+1 : i+3])
		if err != nil {
			return "", false
		}
		b = append(b, c[0])
		i += 2
	}
	key := string(b)
	return key, dirEscape(key) == s
}

// dirNameMayBegin reports whether name can be the file of a key that begins
// with prefix. Names that dirKeyName gives to no key are other people's files.
func dirNameMayBegin(name, prefix string) bool {
	name, ok := strings.CutSuffix(name, dirSuffix)
	if !ok {
		return false
	}
	if cut, sum, long := strings.Cut(name, "~"); long {
		b, err := hex.DecodeString(sum)
		if len(cut) != dirLongCut || len(b) != sha256.Size || err != nil || strings.ToLower(sum) != sum {
			return false
		}
		prefix = dirEscape(prefix)
		return strings.HasPrefix(cut, prefix) || strings.HasPrefix(prefix, cut)
	}
	key, ok := dirUnescape(name)
	return ok && checkStoreKey(key) == nil && dirKeyName(key) == name+dirSuffix && strings.HasPrefix(key, prefix)
}

// A dirEntry is what one file holds.
type dirEntry struct {
	key      string
	revision uint64
	value    []byte
}

// A file is one line
//
//	rollout-store FORMAT REVISION KEYLEN VALUELEN CHECKSUM
//
// then the key, a line feed, and the value. FORMAT is 1, REVISION has 16
// hexadecimal digits, KEYLEN and VALUELEN are decimal, and CHECKSUM is the
// SHA-256, in hexadecimal, of the file without " CHECKSUM". There is one way to
// write an entry: parseDirFile accepts nothing else.
const (
	dirMagic  = "rollout-store"
	dirFormat = 1
)

func formatDirFile(e dirEntry) []byte {
	line := fmt.Sprintf("%s %d %016x %d %d", dirMagic, dirFormat, e.revision, len(e.key), len(e.value))
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n", line, e.key)
	h.Write(e.value)
	b := fmt.Appendf(nil, "%s %x\n%s\n", line, h.Sum(nil), e.key)
	return append(b, e.value...)
}

// parseDirFile returns what formatDirFile wrote. The value is part of b, and
// never nil.
func parseDirFile(b []byte) (dirEntry, error) {
	line, body, _ := bytes.Cut(b, []byte{'\n'})
	if !bytes.HasPrefix(b, []byte(dirMagic+" ")) {
		return dirEntry{}, errors.New("damaged: it does not begin as a file of this store does")
	}
	field := strings.Split(string(line), " ")
	if n, err := strconv.Atoi(field[1]); err == nil && n > dirFormat {
		return dirEntry{}, fmt.Errorf("written in format %d by a newer release; this one reads format %d", n, dirFormat)
	}
	damaged := errors.New("damaged: bad header")
	if len(field) != 6 {
		return dirEntry{}, damaged
	}
	revision, err := strconv.ParseUint(field[2], 16, 63)
	if err != nil || revision == 0 {
		return dirEntry{}, damaged
	}
	keyLen, err1 := strconv.Atoi(field[3])
	valueLen, err2 := strconv.Atoi(field[4])
	if err1 != nil || err2 != nil || keyLen < 1 || keyLen > maxStoreKey || valueLen < 0 {
		return dirEntry{}, damaged
	}
	if got := len(body) - keyLen - 1; got != valueLen {
		return dirEntry{}, fmt.Errorf("damaged: a value of %d bytes, not %d", max(got, 0), valueLen)
	}
	e := dirEntry{string(body[:keyLen]), revision, body[keyLen+1:]}
	if checkStoreKey(e.key) != nil {
		return dirEntry{}, damaged
	}
	if !bytes.Equal(formatDirFile(e), b) {
		return dirEntry{}, errors.New("damaged: wrong checksum")
	}
	return e, nil
}
