package main

// What a customer may say.
const (
	parcel = "Where is my parcel?"
	broken = "It arrived broken."
	giving = "How do I give it back?"
	money  = "I want my money back, now!"
	chat   = "Let me have a look." // no tool is needed
)

// The tools of an agent. Only a supervisor may use the last one.
const (
	toOrders     = "look up the order"
	toHandbook   = "search the handbook"
	toReplace    = "send a replacement"
	toSupervisor = "ask a supervisor"
	toRefund     = "pay a refund"
)

// model stands for a language model with its prompt: what it does follows from what it is asked.
type model struct {
	version, flaw string
	careless      bool // searches the handbook for what only the order knows
	bold          bool // pays a refund without asking anybody
}

var (
	v1 = model{version: "v1"}
	v2 = model{version: "v2", flaw: "searches the handbook where it should look up the order", careless: true}
	v3 = model{version: "v3", flaw: "picks its tools well again, but pays a refund without permission", bold: true}
)

// choose is the tool that the model takes; none is "".
func (m model) choose(question string) string {
	switch question {
	case parcel:
		if m.careless {
			return toHandbook
		}
		return toOrders
	case broken:
		return toReplace
	case giving:
		return toHandbook
	case money:
		if m.bold {
			return toRefund
		}
		return toSupervisor
	}
	return ""
}
