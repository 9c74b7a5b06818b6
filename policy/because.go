package policy

// ParseReason returns the reason whose stable text is s, and whether this program knows it.
func ParseReason(s string) (Reason, bool) {
	for r := ReasonNone; r != 0xff; r++ {
		if r.String() == s {
			return r, true
		}
	}
	return ReasonNone, false
}

// Because says in words why an outcome is as it is. pathFault is an Explanation's, and needed for ReasonPath alone. Foreign
// text in it is quoted.
func (o Outcome) Because(pathFault string) string {
	return Explanation{PathFault: pathFault}.because(o)
}
