//go:build scale

package scale

import (
	"os"
	"strconv"
	"testing"
)

// TestMillionRules: a million rules over ten thousand services, in documents of a thousand rules and of one.
func TestMillionRules(t *testing.T) {
	million := 1_000_000
	if s := os.Getenv("SIGNET_RULES"); s != "" {
		var err error
		if million, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("1,000 rules a document", func(t *testing.T) { rules{services: million / 1000, perService: 1000, perDocument: 1000}.try(t) })
	t.Run("100 rules a document", func(t *testing.T) { rules{services: million / 100, perService: 100, perDocument: 100}.try(t) })
	t.Run("one rule a document", func(t *testing.T) { rules{services: million / 100, perService: 100, perDocument: 1}.try(t) })
}

// TestLargestService: as many rules as one service may have.
func TestLargestService(t *testing.T) {
	rules{services: 2, perService: 140_000, perDocument: 1000}.try(t)
}
