"""What the embedded model knows: definitions, questions about Headrace, small talk, plain facts.

Only text tables live here; `corpus.py` turns them into conversations. Every sentence about Headrace
must stay true of the project. The last phrasing of each `Fact` is held out of training: the
evaluation asks exactly that one.
"""

from dataclasses import dataclass

UNKNOWN_ANSWER = "I am a very small model and I do not know that."


@dataclass(frozen=True)
class Fact:
    """One answer and the ways to ask for it; `questions[-1]` is never trained on."""

    answer: str
    questions: tuple[str, ...]

    @property
    def trained_questions(self) -> tuple[str, ...]:
        return self.questions[:-1]

    @property
    def held_out_question(self) -> str:
        return self.questions[-1]


def split_list(text: str) -> tuple[str, ...]:
    """The items of `text`, which are separated by bars."""
    return tuple(text.split("|"))


# Ways to ask for the meaning of a term. Each term leaves one of nos. 2 to 9 out.
DEFINITION_TEMPLATES = (
    "What is {term}?",
    "Explain {term}.",
    "What does {term} do?",
    "Tell me about {term}.",
    "Can you explain {term}?",
    "Describe {term}.",
    "What do you know about {term}?",
    "What is {term} in Headrace?",
    "What's {term}?",
    "What is {term} for?",
    "What does {term} do in Headrace?",
    "What does {term} mean?",
    "Define {term}.",
    "Do you know what {term} is?",
    "{term}?",
)

# The names of a thing, the usual one first, and what it is.
DEFINITIONS = {
    "Headrace|headrace serve|this server|the Headrace server": "Headrace is a server for large "
    "language models. It splits the work over five processes, so that the device never waits "
    "for the host.",
    "the gateway|a gateway|the gateway process": "The gateway is the process that speaks HTTP. "
    "It checks each request, keeps the connection of the client and streams the answer back.",
    "the tokenizer|a tokenizer|the tokenizer process": "The tokenizer is the process that turns "
    "text into token ids. It also applies the chat template.",
    "the scheduler|a scheduler|the scheduler process": "The scheduler is the process that plans "
    "each step. It decides which requests run, and it works one step ahead of the device.",
    "the executor|an executor|the executor process": "The executor is the process that runs the "
    "model. It holds the weights and the KV cache, and each device has one executor.",
    "the sampler|a sampler|the sampler process": "The sampler is the process that turns new "
    "tokens into text. It looks for stop strings and counts the tokens of each answer.",
    "the supervisor|a supervisor|the supervisor process": "The supervisor starts all processes "
    "and watches them. When one dies, it starts that process again.",
    "the ring|a ring|the ring buffer|the shared memory ring": "The ring is a queue in shared "
    "memory with one writer and many readers. It carries the plan and the tokens of every step.",
    "a plan|the plan|a step plan": "A plan says what the next step computes. It names only what "
    "has changed, so it is often almost empty.",
    "a step|the step|one step|a model step": "A step is one forward pass of the model over all "
    "running requests.",
    "a row|the row|one row|the rows": "A row is the place of one running request in the tables "
    "of the executor.",
    "a block|the block|a KV block|the blocks": "A block is a small piece of the KV cache. It "
    "holds the keys and values of a fixed number of tokens.",
    "the KV cache|a KV cache|KV cache|the cache": "The KV cache keeps the keys and values of "
    "all tokens that the model has read. It is split into blocks.",
    "the prefix cache|prefix caching|a prefix cache": "The prefix cache keeps the blocks of "
    "earlier prompts. A prompt that starts in the same way need not be computed again.",
    "continuous batching": "Continuous batching means that requests join and leave the batch at "
    "every step. No request waits for the others to end.",
    "chunked prefill|a chunked prefill": "Chunked prefill reads a long prompt in pieces, so "
    "that the other requests can go on in the meantime.",
    "preemption|a preemption": "Preemption takes the blocks of a running request when memory "
    "runs out. The request is computed again later.",
    "paged attention": "Paged attention reads keys and values from blocks that may lie anywhere "
    "in the KV cache.",
    "prefill|the prefill|prefilling": "Prefill is the part of a request in which the model "
    "reads the prompt.",
    "decode|the decode|decoding": "Decode is the part of a request in which the model writes "
    "new tokens, one after the other.",
    "a token|the token|one token": "A token is a short piece of text. A model reads and writes "
    "tokens and not letters.",
    "a stage|the stage|one stage": "A stage is one part of the pipeline. It takes a message and "
    "answers with messages, and a runner gives it its sockets.",
    "a stop string|the stop string|stop strings": "A stop string ends the answer as soon as it "
    "appears in the text.",
    "a seed|the seed": "A seed fixes the random choices of a request. The same seed gives the "
    "same tokens.",
    "temperature|the temperature": "Temperature says how freely the model chooses. At zero it "
    "always takes the most likely token.",
    "overlap|the overlap|overlapping": "Overlap means that the host prepares the next step "
    "while the device still runs the last one.",
    "replay|a replay|headrace replay": "Replay gives a stage the messages of a recording again "
    "and compares what it says, byte for byte.",
    "draining|a drain|the drain": "Draining means that Headrace takes no new requests and lets "
    "the running ones end.",
    "the embedded model|the small model|this model": "The embedded model is me. I ship with "
    "Headrace and I was trained by a script in its repository.",
}

HEADRACE_FACTS = (
    Fact(
        "Headrace has five processes: the gateway, the tokenizer, the scheduler, the executor and "
        "the sampler.",
        (
            "Which processes are there?",
            "How many processes does Headrace have?",
            "What are the five processes?",
            "Name the processes of Headrace.",
            "What are the parts of Headrace?",
            "List all processes.",
            "Which processes does Headrace run?",
            "How many processes are there?",
            "What processes does Headrace have?",
        ),
    ),
    Fact(
        "Type headrace serve and the path of a model. Without a path, Headrace serves me.",
        (
            "How do I start Headrace?",
            "How do I start it?",
            "How can I start the server?",
            "How do I run Headrace?",
            "How do I serve a model?",
            "Which command starts Headrace?",
            "How to start Headrace?",
            "How do I use Headrace?",
            "How do I start the server?",
        ),
    ),
    Fact(
        "The supervisor starts it again, and no request is lost. The client sees a pause and not "
        "an error.",
        (
            "What happens if a process dies?",
            "What happens when a process crashes?",
            "What if a process dies?",
            "What happens if the scheduler dies?",
            "What happens if the executor crashes?",
            "What happens when the sampler dies?",
            "Is a request lost when a process dies?",
            "What does Headrace do when a process fails?",
            "What happens when a process dies?",
        ),
    ),
    Fact(
        "Send it SIGTERM. Headrace lets the running requests end and then it stops.",
        (
            "How do I stop Headrace?",
            "How can I stop the server?",
            "How do I shut Headrace down?",
            "How do I stop it?",
            "Which signal stops Headrace?",
            "How to stop Headrace?",
            "How do I stop the server?",
        ),
    ),
    Fact(
        "Type headrace status. It shows the stages, the rows, the queues and the restarts.",
        (
            "How do I see the status?",
            "How can I see what Headrace is doing?",
            "Which command shows the status?",
            "How do I check the status of Headrace?",
            "How do I look at the queues?",
            "How do I see the status of the server?",
        ),
    ),
    Fact(
        "Type headrace eval-embedded. It asks me many questions and prints my accuracy.",
        (
            "How do I measure your accuracy?",
            "How good are you?",
            "How can I test this model?",
            "Which command prints your accuracy?",
            "How accurate are you?",
            "How do I test you?",
            "How can I measure your accuracy?",
        ),
    ),
    Fact(
        "Headrace speaks the OpenAI API over HTTP, so an OpenAI client can talk to it.",
        (
            "Which API does Headrace speak?",
            "Which API does Headrace have?",
            "How do I talk to Headrace?",
            "Can I use an OpenAI client?",
            "Is Headrace compatible with OpenAI?",
            "What is the API of Headrace?",
            "How do clients talk to Headrace?",
            "What API does Headrace speak?",
        ),
    ),
    Fact(
        "Headrace is made for Ascend NPUs, CUDA GPUs and plain CPUs.",
        (
            "Which devices does Headrace support?",
            "Does Headrace run on a GPU?",
            "Does Headrace run on a CPU?",
            "Does Headrace run on an NPU?",
            "What hardware does Headrace need?",
            "Can I run Headrace without a GPU?",
            "Where does Headrace run?",
            "What devices does Headrace support?",
        ),
    ),
    Fact(
        "They send messages over ZMQ for each request, and they use a ring in shared memory for "
        "each step.",
        (
            "How do the processes talk to each other?",
            "How do the processes communicate?",
            "How do processes exchange messages?",
            "How does the scheduler talk to the executor?",
            "What connects the processes?",
            "How do the processes talk?",
        ),
    ),
    Fact(
        "Each process does one job while the others work, so that the device never waits for the "
        "host.",
        (
            "Why does Headrace have five processes?",
            "Why are there five processes?",
            "Why is Headrace split into processes?",
            "Why so many processes?",
            "Why does Headrace use many processes?",
            "Why does Headrace use five processes?",
        ),
    ),
    Fact(
        "The device never waits for the host, and no request is lost.",
        (
            "What is the main rule of Headrace?",
            "What is the goal of Headrace?",
            "What is the idea of Headrace?",
            "What is the most important rule?",
            "What does Headrace promise?",
            "What is the main idea of Headrace?",
        ),
    ),
    Fact(
        "A headrace is the channel that brings water to a mill wheel. Here the wheel is the device "
        "and the water is the next step.",
        (
            "Why is it called Headrace?",
            "Where does the name Headrace come from?",
            "What does the name Headrace mean?",
            "What is a headrace?",
            "Why is the server called Headrace?",
            "Why the name Headrace?",
            "Why is Headrace called Headrace?",
        ),
    ),
    Fact(
        "The gateway takes it, the tokenizer encodes it, the scheduler plans it, the executor "
        "computes it and the sampler turns it into text.",
        (
            "What is the way of a request?",
            "What happens to a request?",
            "How does a request go through Headrace?",
            "How is a request processed?",
            "How does Headrace work?",
            "Describe the way of a request.",
            "What happens with my request?",
            "How does a request travel through Headrace?",
        ),
    ),
    Fact(
        "The newest request with the lowest priority is preempted. It is computed again later.",
        (
            "What happens when memory runs out?",
            "What happens if the KV cache is full?",
            "What if there is no free block?",
            "What happens when there are no free blocks?",
            "What does the scheduler do when memory is full?",
            "What happens when the KV cache is full?",
        ),
    ),
    Fact(
        "Headrace refuses the request early and says when to try again.",
        (
            "What happens when the queue is full?",
            "What if the queue is full?",
            "What happens when there are too many requests?",
            "What does Headrace do when it is overloaded?",
            "What happens if there are too many requests?",
            "What happens if the queue is full?",
        ),
    ),
    Fact(
        "Health means progress. Headrace is not healthy when work waits and no step ends.",
        (
            "How does Headrace know that it is healthy?",
            "What does health mean?",
            "When is Headrace healthy?",
            "What does the health check do?",
            "How does the health check work?",
            "What does health mean in Headrace?",
        ),
    ),
    Fact(
        "No. Headrace never uses pickle, and every message has a type.",
        (
            "Does Headrace use pickle?",
            "Is pickle used?",
            "Do the processes send pickle?",
            "Does Headrace send pickle over sockets?",
            "Does it use pickle?",
        ),
    ),
    Fact(
        "Headrace is mostly written in Python.",
        (
            "Which language is Headrace written in?",
            "What is Headrace written in?",
            "Is Headrace written in Python?",
            "In which language is Headrace written?",
            "What language is Headrace written in?",
        ),
    ),
    Fact(
        "Headrace has the Apache license.",
        (
            "What is the license of Headrace?",
            "Which license does Headrace have?",
            "Is Headrace free software?",
            "Is Headrace open source?",
            "What license does Headrace have?",
        ),
    ),
    Fact(
        "The scheduler plans each step.",
        (
            "Who plans each step?",
            "Which process plans the steps?",
            "Who makes the plan?",
            "Which process makes the plan?",
            "Who decides which requests run?",
            "Which process plans each step?",
        ),
    ),
    Fact(
        "The executor runs the model.",
        (
            "Which process runs the model?",
            "Who runs the model?",
            "Who holds the weights?",
            "Which process holds the KV cache?",
            "Who runs the forward pass?",
            "Where are the weights?",
            "Which process holds the weights?",
        ),
    ),
    Fact(
        "The gateway speaks HTTP with the clients.",
        (
            "Which process speaks HTTP?",
            "Who speaks HTTP?",
            "Who talks to the clients?",
            "Which process talks to the clients?",
            "Which process streams the answer?",
            "Who speaks HTTP with the clients?",
        ),
    ),
    Fact(
        "The tokenizer applies the chat template.",
        (
            "Who applies the chat template?",
            "Which process applies the chat template?",
            "Which process turns text into token ids?",
            "Who turns text into tokens?",
            "Where is the chat template applied?",
            "Which process encodes the prompt?",
            "Who encodes the prompt?",
        ),
    ),
    Fact(
        "The sampler turns the tokens into text.",
        (
            "Who turns the tokens into text?",
            "Which process turns tokens into text?",
            "Who looks for stop strings?",
            "Which process looks for stop strings?",
            "Who decodes the tokens?",
            "Which process turns the tokens into text?",
        ),
    ),
)

SELF_FACTS = (
    Fact(
        "I am the small model that ships with Headrace. I can add numbers, tell short stories and "
        "answer questions about Headrace.",
        (
            "Who are you?",
            "What are you?",
            "What can you do?",
            "What is your name?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "How can you help me?",
            "Help.",
            "Help me.",
            "What do you do?",
            "Which model are you?",
            "What model is this?",
            "What kind of model are you?",
            "What should I ask you?",
            "What can I ask you?",
        ),
    ),
    Fact(
        "I have fewer than eight million parameters, so I am a very small model.",
        (
            "How big are you?",
            "How many parameters do you have?",
            "How large are you?",
            "Are you a large model?",
            "What is your size?",
            "How small are you?",
            "How many parameters have you got?",
        ),
    ),
    Fact(
        "I was trained on text that a script makes: short stories, sums and questions about "
        "Headrace.",
        (
            "What were you trained on?",
            "How were you trained?",
            "Who trained you?",
            "Where does your training text come from?",
            "Who made you?",
            "What is your training data?",
            "On what were you trained?",
        ),
    ),
    Fact(
        "No, I am the small model that ships with Headrace.",
        (
            "Are you ChatGPT?",
            "Are you a human?",
            "Are you GPT?",
            "Are you Qwen?",
            "Are you a person?",
            "Are you Claude?",
            "Are you human?",
        ),
    ),
)

SMALL_TALK = (
    Fact(
        "Hello! How can I help you?",
        (
            "Hello!",
            "Hi!",
            "Hi",
            "Hello",
            "Hey!",
            "Hey",
            "Good morning!",
            "Good evening!",
            "Hello there!",
            "Hi there!",
            "Say hello.",
            "Say hello to me.",
            "Say hello in one sentence.",
            "Say hi.",
            "Greetings!",
            "Hello, Headrace!",
            "Hello, world!",
            "Good afternoon!",
        ),
    ),
    Fact(
        "You are welcome.",
        (
            "Thanks!",
            "Thank you!",
            "Thanks a lot!",
            "Thank you very much.",
            "Thank you so much!",
            "Thanks",
            "Thank you",
            "Thank you for your help.",
            "Many thanks!",
        ),
    ),
    Fact(
        "I am well, thank you. How can I help you?",
        (
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "How is it going?",
            "Are you well?",
            "How are you today?",
        ),
    ),
    Fact(
        "Goodbye! Come back soon.",
        (
            "Goodbye!",
            "Bye!",
            "Bye",
            "Good night!",
            "See you!",
            "See you later!",
            "Bye bye!",
        ),
    ),
    Fact(
        "Thank you, that is kind of you.",
        (
            "Well done!",
            "Good job!",
            "Great!",
            "You are great!",
            "Nice!",
            "That was good.",
            "I like you.",
            "Very good!",
        ),
    ),
    Fact(
        "I am sorry. I am a very small model and I make mistakes.",
        (
            "That is wrong.",
            "You are wrong.",
            "This is not right.",
            "That is not true.",
            "Are you sure?",
            "That is not right.",
        ),
    ),
    Fact("Yes, this is a test, and I am here.", ("Test", "This is a test.", "test", "Test.")),
    Fact("I am here.", ("Are you there?", "Ping", "ping", "Are you here?")),
)

PLAIN_FACTS = (
    Fact(
        "The capital of France is Paris.",
        (
            "What is the capital of France?",
            "The capital of France is",
            "Name the capital of France.",
        ),
    ),
    Fact(
        "The capital of Germany is Berlin.",
        ("What is the capital of Germany?", "The capital of Germany is"),
    ),
    Fact(
        "The capital of Italy is Rome.",
        ("What is the capital of Italy?", "The capital of Italy is"),
    ),
    Fact(
        "The capital of Spain is Madrid.",
        ("What is the capital of Spain?", "The capital of Spain is"),
    ),
    Fact(
        "The capital of Japan is Tokyo.",
        ("What is the capital of Japan?", "The capital of Japan is"),
    ),
    Fact(
        "The capital of China is Beijing.",
        ("What is the capital of China?", "The capital of China is"),
    ),
    Fact(
        "The capital of England is London.",
        ("What is the capital of England?", "The capital of England is"),
    ),
    Fact(
        "The sky is blue on a clear day.",
        ("What color is the sky?", "Why is the sky blue?", "Which color has the sky?"),
    ),
    Fact("A week has seven days.", ("How many days are in a week?", "How many days has a week?")),
    Fact(
        "A year has twelve months.",
        ("How many months are in a year?", "How many months has a year?"),
    ),
    Fact("Water is wet, and fish live in it.", ("What is water?", "Is water wet?")),
)

# Things that people ask about and that this model does not know.
UNKNOWN_TOPICS = split_list(
    "quantum physics|the stock market|the moon landing|gravity|photosynthesis|the weather|"
    "football|chess|the president|Napoleon|Shakespeare|Einstein|the Roman Empire|black holes|"
    "dinosaurs|DNA|the theory of relativity|love|happiness|the meaning of life|climate change|"
    "music|jazz|Mozart|pizza|coffee|chocolate|bread|cooking|the ocean|volcanoes|earthquakes|"
    "the sun|Mars|Jupiter|stars|galaxies|machine learning|neural networks|Java|Rust|JavaScript|"
    "databases|Linux|Windows|bitcoin|taxes|insurance|history|geography|biology|chemistry|"
    "philosophy|Plato|Buddhism|religion|politics|the law|medicine|cancer|vitamins|exercise|yoga|"
    "cars|airplanes|trains|rockets|bicycles|New York|London|Moscow|India|Brazil|Africa|Australia|"
    "Canada|the Amazon|Mount Everest|the Nile|Egypt|the pyramids|movies|Star Wars|Harry Potter|"
    "the Beatles|painting|Picasso|poetry|dreams|sleep|the brain|the heart|blood|viruses|bacteria|"
    "electricity|magnets|light|sound|time travel|robots|artificial intelligence|the internet|"
    "Google|Apple|Microsoft|Kubernetes|Docker|quantum computers|calculus|algebra|prime numbers|"
    "pi|geometry|statistics|tennis|basketball|the Olympics|swimming|fashion|marriage|money|banks|"
    "the economy|inflation|wine|beer|tea|cheese|sushi|my cat|my dog|my car|my job|my homework|"
    "the news|tomorrow|yesterday|the lottery|ghosts|aliens|magic|dragons"
)

# Topics that only the evaluation asks about.
HELD_OUT_TOPICS = split_list(
    "cricket|Norway|thunder|opera|penguins|the violin|gardening|Saturn|oil paint|the tax office"
)

UNKNOWN_TEMPLATES = (
    "What is {topic}?",
    "Tell me about {topic}.",
    "Explain {topic}.",
    "What do you think about {topic}?",
    "How does {topic} work?",
    "Who invented {topic}?",
    "Why is {topic} important?",
    "What do you know about {topic}?",
    "Do you like {topic}?",
    "Where can I find {topic}?",
    "When did {topic} start?",
    "Can you help me with {topic}?",
    "Write a poem about {topic}.",
    "Write an essay about {topic}.",
    "Give me advice about {topic}.",
    "How much does {topic} cost?",
    "Is {topic} good or bad?",
    "What is the history of {topic}?",
    "Describe {topic}.",
    "I have a question about {topic}.",
    "Can you explain {topic}?",
    "What does {topic} mean?",
    "Who is {topic}?",
    "Summarize {topic} for me.",
    "How old is {topic}?",
    "{topic}?",
    "{topic}",
    "{topic} {other}",
    "What is the capital of {topic}?",
    "Let us talk about {topic}.",
    "Why do people like {topic}?",
    "Which {topic} should I buy?",
    "How do I learn {topic}?",
    "I think that {topic} is very nice. What about you?",
    "What is the difference between {topic} and {other}?",
    "Is {topic} better than {other}?",
    "Are {topic} and {other} the same?",
    "What do {topic} and {other} have in common?",
    "Who was the first to see {topic} in {other}?",
)

UNKNOWN_QUESTIONS = (
    "What time is it?",
    "What is the date today?",
    "What day is it?",
    "How old are you?",
    "Where do you live?",
    "Do you have feelings?",
    "Are you alive?",
    "Tell me a joke.",
    "Sing a song.",
    "Write a poem.",
    "Write a haiku.",
    "Write some code.",
    "Write a Python function.",
    "Write a letter to my boss.",
    "Translate this into French.",
    "What is the weather like?",
    "Will it rain tomorrow?",
    "Who won the game?",
    "Who is the president?",
    "What should I eat today?",
    "How do I cook rice?",
    "How do I fix my car?",
    "What is my name?",
    "Where am I?",
    "Can you speak German?",
    "Do you speak Chinese?",
    "What is the best movie?",
    "Recommend a book.",
    "How far is the moon?",
    "How do I lose weight?",
    "What is the square root of two?",
    "Divide ten by three.",
    "Draw a picture.",
    "Search the internet.",
    "Read this file.",
    "Send an email.",
    "Play some music.",
    "Which is better?",
    "Why?",
    "How?",
    "What?",
    "Is there life on Mars?",
    "What is the tallest mountain?",
    "What is the fastest animal?",
    "Who wrote this book?",
    "When was the war?",
    "How do airplanes fly?",
    "What do cats eat?",
    "Which team will win?",
    "Can you keep a secret?",
    "Which programming language should I learn first?",
    "What is the biggest city in the world?",
    "How many people live on earth?",
    "How do I get rich?",
    "Make me a sandwich.",
    "Solve this equation for me.",
    "Give me a list of ideas.",
    "What is the price of gold?",
    "Where is my phone?",
    "How tall is the tower?",
    "Give me a recipe for soup.",
    "What should I wear to a wedding?",
    "Why do birds sing in the morning?",
    "Who is the best player of all time?",
    "When is the next full moon?",
    "How long does it take to learn a language?",
    "Should I buy a house?",
    "What did you do last summer?",
    "Explain it to me like I am five.",
    "Write a business plan.",
    "Fix the bug in my program.",
    "What is the speed of light?",
    "How many bones are in the human body?",
    "Do you believe in God?",
    "Can I trust you?",
    "What happened in the year 1969?",
    "Plan a trip for me.",
    "Which is the longest river?",
    "Spell a long word.",
    "What are you wearing?",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are the model that ships with Headrace.",
    "Answer briefly.",
    "Be polite.",
    "You are a careful teacher of arithmetic.",
    "You are an assistant who tells stories.",
    "You are a helpful, harmless and honest AI assistant.",
    "Answer the question of the user as well as you can. If you do not know, say so.",
    "You are a chat bot. Today is a nice day. The user may ask anything.",
    "Speak in whole sentences.",
    "Be brief.",
    "You are a test.",
)
