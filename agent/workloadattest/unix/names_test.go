package unix

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestNamesAreRememberedForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := map[string]int{}
		absent := errors.New("no such id")
		n := newNames(func(id string) (string, error) {
			asked[id]++
			if id == "9" {
				return "", absent
			}
			return "user" + id, nil
		})
		for range 3 {
			if name, err := n.of("1"); name != "user1" || err != nil {
				t.Errorf("%q, %v", name, err)
			}
			if _, err := n.of("9"); !errors.Is(err, absent) {
				t.Errorf("an id without a name: %v", err)
			}
		}
		if asked["1"] != 1 || asked["9"] != 3 {
			t.Errorf("asked %v times", asked)
		}
		time.Sleep(nameFor)
		n.of("1")
		if asked["1"] != 2 {
			t.Error("a name is remembered for longer than it should")
		}
		for i := range 3 * maxNames {
			n.of(fmt.Sprint("1", i))
		}
		if len(n.known) > maxNames {
			t.Errorf("%d names are remembered, at most %d may be", len(n.known), maxNames)
		}
	})
}
