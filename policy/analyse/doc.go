// Package analyse answers questions about call policies as a whole, for the people who write them: which change would let
// a denied call through, who may call a service, what a proposal changes, what a policy holds that was hardly meant, who is
// locked out by it, and which policy would allow what was seen. The CA asks it before it applies documents, the command line
// before and after. It decides nothing itself: where an answer is about a call, package policy decided that call.
//
// It holds no sockets, no clocks and no goroutines, and its work is bounded: an answer that stopped early says so.
package analyse
